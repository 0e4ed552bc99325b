() => {
    // The conversations that this browser keeps, and the list of them in the sidebar. Nothing of it goes anywhere but to
    // the page's own server, when one is opened. All tabs share one database; each conversation is a row of its own, so
    // no tab writes over what another one has filed.
    const limits = { conversations: 50, bytes: 50e6 };
    const channel = "BroadcastChannel" in window ? new BroadcastChannel("mmmamba-chats") : null;
    // Of this tab: which row its conversation is, and the stamp of that row when this tab last read or wrote it.
    const remembered = () => window.mmmamba.store("mmmamba-chat") || {};
    let own = {};
    let wanted = {}; // what the server was asked to go on with

    const result = (request) =>
        new Promise((resolve, reject) => {
            request.onsuccess = () => resolve(request.result);
            request.onerror = () => reject(request.error);
        });
    let opening = null;
    const database = () => {
        if (opening) return opening;
        const request = indexedDB.open("mmmamba-chats", 1);
        request.onupgradeneeded = () => {
            request.result.createObjectStore("entries", { keyPath: "id" });
            request.result.createObjectStore("records", { keyPath: "id" });
        };
        opening = result(request);
        return opening;
    };
    // Both stores in one transaction: other tabs see all of a change, or nothing. A browser may refuse to keep anything.
    const change = async (work) => {
        try {
            const transaction = (await database()).transaction(["entries", "records"], "readwrite");
            const done = new Promise((resolve, reject) => {
                transaction.oncomplete = resolve;
                transaction.onabort = transaction.onerror = () => reject(transaction.error);
            });
            done.catch(() => {});
            const value = await work(transaction.objectStore("entries"), transaction.objectStore("records"));
            await done;
            channel?.postMessage("changed");
            await show();
            return value;
        } catch (error) {
            say("This browser keeps no conversations: its storage is full or switched off.");
            return null;
        }
    };
    const read = async (store, what) => {
        try {
            return await what((await database()).transaction(store).objectStore(store));
        } catch {
            return null;
        }
    };
    // No crypto.randomUUID: a page in a local network, without TLS, has none.
    const unique = () => Date.now().toString(36) + Math.random().toString(36).slice(2);
    const newest = (a, b) => b.time - a.time;
    const claim = (row) => {
        own = row;
        window.mmmamba.store("mmmamba-chat", row);
    };

    const file = (record) =>
        change(async (entries, records) => {
            const before = own.id ? await result(entries.get(own.id)) : undefined;
            // Another tab went on with the same conversation: both ways of it are kept.
            const id = own.id && (!before || before.stamp === own.stamp) ? own.id : unique();
            const first = JSON.parse(record).turns[0];
            const entry = {
                id,
                stamp: unique(),
                title: first.text.trim().slice(0, 200),
                time: Date.now(),
                bytes: new Blob([record]).size,
            };
            const rest = (await result(entries.getAll())).filter((other) => other.id !== id).sort(newest);
            let bytes = entry.bytes;
            let gone = 0;
            rest.forEach((other, i) => {
                bytes += other.bytes;
                if (i + 2 <= limits.conversations && bytes <= limits.bytes) return;
                gone += 1;
                entries.delete(other.id);
                records.delete(other.id);
            });
            entries.put(entry);
            records.put({ id, record });
            claim({ id, stamp: entry.stamp });
            if (gone) say(gone === 1 ? "The oldest conversation made room." : `The ${gone} oldest conversations made room.`);
        });
    const remove = (ids) =>
        change((entries, records) => {
            for (const id of ids) {
                entries.delete(id);
                records.delete(id);
            }
        });

    const make = (tag, fields, ...inside) => {
        const element = Object.assign(document.createElement(tag), fields);
        element.append(...inside);
        return element;
    };
    const say = (text) => {
        const line = document.querySelector("#earlier-said");
        if (line) line.textContent = text;
    };
    const when = (time) => {
        const today = new Date(time).toDateString() === new Date().toDateString();
        return new Date(time).toLocaleString([], today ? { timeStyle: "short" } : { dateStyle: "medium", timeStyle: "short" });
    };
    const show = async () => {
        const entries = ((await read("entries", (store) => result(store.getAll()))) || []).sort(newest);
        const list = document.querySelector("#earlier ul");
        if (!list) return;
        const others = entries.filter((entry) => entry.id !== own.id);
        const rows = others.map((entry) => {
            const open = make("button", { type: "button", className: "earlier-open" });
            open.append(make("span", { textContent: entry.title }), make("time", { textContent: when(entry.time) }));
            open.onclick = () => {
                wanted = { id: entry.id, stamp: entry.stamp };
                document.querySelector("#earlier-go").click();
            };
            const drop = make("button", { type: "button", className: "earlier-delete", textContent: "×" });
            drop.setAttribute("aria-label", `Delete: ${entry.title}`);
            drop.title = "Delete";
            drop.onclick = async () => {
                const place = [...list.children].indexOf(drop.parentElement);
                await remove([entry.id]);
                say("Deleted.");
                const left = list.querySelectorAll(".earlier-delete");
                (left[Math.min(place, left.length - 1)] || document.querySelector("#clear")).focus();
            };
            return make("li", {}, open, drop);
        });
        list.replaceChildren(...rows);
        const all = document.querySelector("#earlier-clear");
        all.onclick = async () => {
            if (!confirm(`Delete all ${others.length} earlier conversations from this browser?`)) return;
            await remove(others.map((entry) => entry.id));
            document.querySelector("#clear").focus();
        };
        document.querySelector("#earlier").hidden = !others.length;
    };
    channel?.addEventListener("message", show);

    window.mmmamba.chats = {
        limits,
        // The server's record of the conversation; "nothing" if none is to be kept, empty if nothing is new.
        keep: async (record) => {
            if (!record) return;
            if (record !== "nothing") return file(record);
            const { id } = own;
            claim({});
            if (id) await remove([id]);
        },
        // New chat: what was there stays in the list.
        leave: () => {
            claim({});
            say("");
            return show();
        },
        wanted: async () => {
            const row = wanted.id && (await read("records", (store) => result(store.get(wanted.id))));
            return [row ? row.record : ""];
        },
        // The server goes on with what it was sent: this tab has that row from now on; a file's has none yet.
        opened: (how) => {
            if (how) claim(how === "file" ? {} : wanted);
            wanted = {};
            say("");
            return show();
        },
    };
    wanted = remembered();
    if (wanted.id) {
        return (async () => {
            const entry = await read("entries", (store) => result(store.get(wanted.id)));
            if (entry) wanted = { id: entry.id, stamp: entry.stamp };
            return window.mmmamba.chats.wanted();
        })();
    }
    return [""];
}
