() => {
    // Runs once, when the page was loaded. It gives names for screen readers where Gradio leaves them out, stops at
    // Escape, copies without the marks of `app.shown`, and keeps what was typed while the server cannot be reached.
    const BOXES = { "#box textarea": "#notice", "#compare-box textarea": "#compare-notice" };
    const LOST =
        "The connection to the server was lost. What you wrote is kept: once the server is back, this page loads " +
        "again by itself, and your message stands in the box.";
    const BACK =
        "The connection was lost and is back, so this page was loaded again. What you wrote stands in the box; " +
        "pictures have to be added again.";
    // Of a tab, until it is closed. A browser may refuse it; then the page goes on without.
    const store = (name, value) => {
        try {
            if (value !== undefined) sessionStorage.setItem(name, JSON.stringify(value));
            return JSON.parse(sessionStorage.getItem(name));
        } catch {
            return null;
        }
    };
    const drafts = store("mmmamba-drafts") || {};
    const back = { ...drafts };
    let lost = false;

    const say = (place, text) => {
        const line = document.createElement("div");
        line.className = "notice lost";
        line.role = "alert";
        line.textContent = text;
        document.querySelector(place)?.after(line);
    };
    const draft = (box) => {
        drafts[box] = document.querySelector(box)?.value ?? "";
        store("mmmamba-drafts", drafts);
    };
    const name = () => {
        document.querySelector("#box textarea")?.setAttribute("aria-label", "Your message");
        document.querySelector("#compare-box textarea")?.setAttribute("aria-label", "Question to the models");
        for (const picture of document.querySelectorAll('#chat img[alt=""]'))
            picture.alt = decodeURIComponent(picture.src.split("/").pop());
    };
    const giveBack = () => {
        for (const [box, place] of Object.entries(BOXES)) {
            const area = document.querySelector(box);
            const text = back[box];
            if (!area || !text) continue;
            delete back[box];
            if (area.value) continue;
            area.value = text;
            area.dispatchEvent(new Event("input", { bubbles: true }));
            if (store("mmmamba-lost")) say(place, BACK);
        }
    };
    // Gradio tells of it in a message of its own only, and loads the page again when the server answers.
    const notice = () => {
        if (lost) return;
        const said = [...document.querySelectorAll(".toast-body.error")].map((toast) => toast.innerText);
        if (!said.some((text) => text.includes("Connection to the server was lost"))) return;
        lost = true;
        store("mmmamba-lost", true);
        for (const place of Object.values(BOXES)) say(place, LOST);
    };
    // The comparison is drawn anew with each update, and a region that is replaced is not read out. So answers are said
    // here, whole, in a region that stays.
    const spoken = document.createElement("div");
    spoken.id = "spoken";
    spoken.setAttribute("role", "log");
    spoken.setAttribute("aria-label", "Answers of the models");
    spoken.style.cssText = "position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%)";
    document.body.append(spoken);
    // Updates that come fast are drawn as one, so that nobody was seen writing: the rest is said when all have ended.
    const writing = new Set();
    const heard = new Set();
    let drawn = null; // what was there when they ended the last time: a question that was refused draws nothing anew
    const speak = (ended = false) => {
        if (ended && drawn === document.querySelector("#panel")?.innerHTML) return;
        for (const side of document.querySelectorAll("#panel .side")) {
            const model = side.getAttribute("aria-label");
            if (side.getAttribute("aria-busy") === "true") writing.add(model);
            else if (writing.delete(model) || (ended && !heard.has(model))) {
                heard.add(model);
                if (side.querySelector("[role=alert]")) continue;
                const line = document.createElement("p");
                line.textContent = `${model}: ${side.querySelector(".words").textContent}`;
                spoken.append(line);
                if (spoken.children.length > 8) spoken.firstChild.remove();
            }
        }
        if (!ended) return;
        heard.clear();
        drawn = document.querySelector("#panel")?.innerHTML;
    };
    const look = () => {
        name();
        giveBack();
        notice();
        speak();
    };
    look();
    new MutationObserver(look).observe(document.body, { childList: true, subtree: true });
    document.addEventListener("input", (event) => {
        for (const box of Object.keys(BOXES)) if (event.target.matches?.(box)) draft(box);
    });
    // A message was answered, or given back: what stands in the box is all that is to be kept.
    const settled = () => {
        if (lost) return;
        store("mmmamba-lost", false);
        for (const line of document.querySelectorAll(".lost")) line.remove();
        for (const box of Object.keys(BOXES)) if (!(box in back)) draft(box);
    };
    window.mmmamba = { store, settled: () => setTimeout(settled, 100), ended: () => setTimeout(speak, 100, true) };

    const isBox = (element) => Object.keys(BOXES).some((box) => element.matches?.(box));
    // A key held down sends once.
    const once = (event) => {
        if (event.key !== "Enter" || !event.repeat || event.shiftKey || !isBox(event.target)) return;
        event.preventDefault();
        event.stopImmediatePropagation();
    };
    document.addEventListener("keydown", once, true);
    document.addEventListener("keydown", (event) => {
        if (event.key !== "Escape") return;
        for (const stop of document.querySelectorAll("#box .stop-button, #compare-box .stop-button, #grow-stop"))
            if (stop.offsetParent !== null && !stop.disabled) stop.click();
    });
    // A picture let go beside the message box would replace the page by the picture, with all that was typed.
    const held = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
    document.addEventListener("dragover", (event) => {
        if (held(event)) event.preventDefault();
    });
    document.addEventListener("drop", (event) => {
        if (!held(event) || event.defaultPrevented) return;
        event.preventDefault();
        if (event.target.closest("#box, #compare-box")) return;
        const open = [...document.querySelectorAll(Object.keys(BOXES).join())].find((box) => box.offsetParent !== null);
        const files = { dataTransfer: event.dataTransfer, bubbles: true, cancelable: true };
        open?.dispatchEvent(new DragEvent("drop", files));
    });
    // A picture in a box that the browser does not know, a TIFF say; in the chat it gets a copy that it knows.
    const PICTURE =
        "data:image/svg+xml," +
        encodeURIComponent(
            '<svg xmlns="http://www.w3.org/2000/svg" width="40" height="40" viewBox="0 0 24 24" fill="none" ' +
                'stroke="#64748b" stroke-width="1.5"><rect x="3" y="5" width="18" height="14" rx="2"/>' +
                '<circle cx="9" cy="10" r="1.5"/><path d="m4 18 6-5 4 3 3-2 4 4"/></svg>',
        );
    const stand = ({ target }) => {
        if (target.matches?.("#box img, #compare-box img") && target.src !== PICTURE) target.src = PICTURE;
    };
    document.addEventListener("error", stand, true);
    const typed = (text) => text.replace(/([<&!])\u2060/g, "$1").replace(/\u2060(?=[.)])/g, "");
    if (navigator.clipboard) {
        const write = navigator.clipboard.writeText.bind(navigator.clipboard);
        navigator.clipboard.writeText = (text) => write(typed(text));
    }
    document.addEventListener("copy", (event) => {
        const text = String(getSelection());
        if (typed(text) === text) return;
        event.clipboardData.setData("text/plain", typed(text));
        event.preventDefault();
    });
}
