from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmmamba import DecodeState, SamplingParams, cli, cost, flags, load_model
from mmmamba.checkpoint import read_config
from mmmamba.conversation import Conversation
from mmmamba.generate import decode_one_token
from mmmamba.place import default_dtype
from quantize import SCHEMES

ROOT = Path(__file__).parent.parent
KINDS = ("hovle", "linear", "hybrid")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (70, 50), "red").save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return status, out, err


def test_chat_streams_the_answer_to_stdout_alone(
    capsys: pytest.CaptureFixture[str], tiny_dir: Path, picture: Path
) -> None:
    ask = ("chat", "--model", tiny_dir, "--dtype", "float32", "--greedy", "--max-new-tokens", 8)
    ask = (*ask, "--image", picture, "What is it?")
    status, out, err = run(capsys, *ask)
    assert (status, err) == (0, "")
    status, line, err = run(capsys, *ask, "--json")
    assert (status, err) == (0, "")
    assert line.count("\n") == 1
    record = json.loads(line)
    assert out == record["text"] + "\n"
    assert 1 < record["num_tokens"] <= 8
    assert record["finish_reason"] in ("stop", "length")
    assert 0 < record["ttft_ms"] <= record["elapsed_ms"]
    assert record["tok_per_sec"] > 0
    config = read_config(tiny_dir)
    # 70 x 50 pixels are nearest to a 4 x 3 grid; and the thumbnail
    assert record["image_tokens"] == 13 * config.tokens_per_tile
    assert record["state_bytes"] == cost.state_bytes(config)
    assert record["context_tokens"] == record["image_tokens"] + record["text_tokens"]


def test_a_seed_repeats_the_answer(capsys: pytest.CaptureFixture[str], tiny_dir: Path) -> None:
    ask = ("chat", "--model", tiny_dir, "--temperature", 2, "--top-p", 1, "--max-new-tokens", 24, "Hello")
    answers = [run(capsys, *ask, "--seed", seed)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_chat_with_packed_weights(capsys: pytest.CaptureFixture[str], tiny_dir: Path, scheme: str) -> None:
    ask = ("chat", "--model", tiny_dir, "--quantize", scheme, "--greedy", "--max-new-tokens", 4, "--json", "Hello")
    status, out, err = run(capsys, *ask)
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert (record["quantize"], record["num_tokens"] > 0) == (scheme, True)


def test_weights_stored_in_4_bits_stay_so_and_that_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle_dir: Path, tmp_path: Path
) -> None:
    """As on the page: where the C that multiplies with them can be built."""
    model = bundle_dir / "linear"
    ask = ("chat", "--model", model, "--device", "cpu", "--greedy", "--max-new-tokens", 2, "--json")
    dtype = str(default_dtype(torch.device("cpu"))).removeprefix("torch.")
    chosen = []
    for lib, said in ((object(), "int4: {} is stored in 4 bits, nothing is lost"), (None, "{1} rather than int4: why")):
        monkeypatch.setattr("mmmamba.kernels.native.load_native", lambda lib=lib: (lib, "why"))
        with monkeypatch.context() as slow:
            slow.setattr("quantize.linear.load_native", lambda: (None, "a test"))
            slow.setattr("mmmamba.decoder_cpu.load_native", lambda: (None, "a test"))
            status, out, err = run(capsys, *ask, "Hello")
        assert (status, err) == (0, f"mmmamba: {said.format(model, dtype)}\n")
        chosen.append(json.loads(out)["quantize"])
    assert chosen == ["int4", None]
    (tmp_path / "in.jsonl").write_text('{"question": "Hello"}')
    files = (tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    status, _, err = run(capsys, "batch", *files, "--model", model, "--max-new-tokens", 2)
    assert (status, err.splitlines()[0]) == (0, f"mmmamba: {dtype} rather than int4: why")


@pytest.mark.parametrize(
    ("given", "quantize", "dtype"),
    [
        ("--precision float32", None, "float32"),
        ("--precision bfloat16", None, "bfloat16"),
        ("--precision int8 --dtype float32", "int8", "float32"),
        ("--dtype bfloat16", None, "bfloat16"),
        ("--dtype float32 --quantize int4", "int4", "float32"),
        ("--quantize int8", "int8", str(default_dtype(torch.device("cpu"))).removeprefix("torch.")),
    ],
)
def test_a_precision_that_is_asked_for(
    capsys: pytest.CaptureFixture[str], bundle_dir: Path, given: str, quantize: str | None, dtype: str
) -> None:
    """By its name or the older two; then there is nothing to say."""
    ask = ("chat", "--model", bundle_dir / "linear", "--device", "cpu", "--max-new-tokens", 2, "--json", "Hello")
    status, out, err = run(capsys, *ask, *given.split())
    assert (status, err) == (0, "")
    record = json.loads(out)
    assert (record["quantize"], record["dtype"]) == (quantize, dtype)


def test_schemes_are_those_of_the_quantizer() -> None:
    """Named here too: `--help` should not wait for its import."""
    assert tuple(SCHEMES) == flags.SCHEMES


def test_conversation_from_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_dir: Path, picture: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"one\n\n/image {picture}\ntwo\n/new\none\n/quit\nthree\n"))
    status, out, err = run(capsys, "chat", "--model", tiny_dir, "--greedy", "--max-new-tokens", 3, "--json")
    assert (status, err) == (0, "")
    first, second, fresh = map(json.loads, out.splitlines())
    assert first["image_tokens"] == 0 < second["image_tokens"]
    assert second["text_tokens"] > first["text_tokens"] + len("two")
    assert fresh["text"] == first["text"]
    assert fresh["context_tokens"] == first["context_tokens"]


def test_conversation_carries_its_state(tiny_dir: Path) -> None:
    """A second turn costs its own tokens only, and gives what reading everything again gives."""
    model = load_model(tiny_dir)
    params = SamplingParams(greedy=True, max_new_tokens=6)
    chat = Conversation(model)
    *_, first = chat.ask("Hello", params=params)
    before = chat.state.seqlen
    *_, second = chat.ask("and?", params=params)

    turn = chat.tokenizer
    start, end = turn.token_id("<|im_start|>"), turn.token_id("<|im_end|>")
    newline = turn.encode("\n")

    def block(role: str, text: str) -> list[int]:
        return [start, *turn.encode(f"{role}\n{text}"), end, *newline]

    opener = [start, *turn.encode("assistant\n")]
    state = DecodeState.allocate(model.config)
    logits = model(torch.tensor([block("user", "Hello") + opener]), None, state)[0, -1]
    replies: list[list[int]] = []
    for question in ("and?", None):
        reply: list[int] = []
        while len(reply) < 6 and (token := int(logits[: turn.vocab_size].argmax())) not in (0, 1, 2):
            reply.append(token)
            logits = model(torch.tensor([[token]]), None, state)[0, -1]
        replies.append(reply)
        if question:
            ids = [end, *newline, *block("user", question), *opener]
            logits = model(torch.tensor([ids]), None, state)[0, -1]
    assert [first.reply, second.reply] == [turn.decode(reply) for reply in replies]
    assert chat.state.seqlen == state.seqlen > before
    for name, tensor in chat.state.tensors().items():
        torch.testing.assert_close(tensor, state.tensors()[name], atol=1e-5, rtol=1e-5, msg=name)


def test_an_abandoned_turn_leaves_the_conversation_as_it_was(tiny_dir: Path) -> None:
    chat = Conversation(load_model(tiny_dir))
    params = SamplingParams(greedy=True, max_new_tokens=4)
    list(chat.ask("one", params=params))
    kept = {name: tensor.clone() for name, tensor in chat.state.tensors().items()}
    events = chat.ask("two", params=params)
    next(events)
    events.close()
    assert chat.num_turns == 1
    for name, tensor in chat.state.tensors().items():
        assert torch.equal(tensor, kept[name]), name


def test_ctrl_c_ends_the_answer_and_keeps_the_turn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_dir: Path
) -> None:
    calls = []

    def interrupting(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return decode_one_token(*args)

    monkeypatch.setattr("mmmamba.generate.decode_one_token", interrupting)
    before = signal.getsignal(signal.SIGINT)
    status, out, err = run(
        capsys, "chat", "--model", tiny_dir, "--json", "--seed", 0, "--temperature", 2, "--max-new-tokens", 5000, "Hi"
    )
    record = json.loads(out)
    assert record["finish_reason"] == "cancel"
    assert 0 < record["num_tokens"] < 20
    assert (status, err) == (130, "")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_interrupts_at_once() -> None:
    cancel = threading.Event()
    with cli._interrupt_sets(cancel):
        os.kill(os.getpid(), signal.SIGINT)
        assert cancel.wait(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_sees_a_progress_bar_and_the_figures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_dir: Path
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    options = ("--dtype", "float32", "--greedy", "--max-new-tokens", 3)
    status, out, _ = run(capsys, "chat", "--model", tiny_dir, *options, "Hello")
    shown = terminal.getvalue()
    assert status == 0
    assert "loading   0%" in shown
    assert "[3 tokens, " in shown
    assert "state 27 KiB at " in shown
    assert "loading" not in out


def test_reader_of_the_pipe_goes_away(tiny_dir: Path) -> None:
    """As in `... | head -c 1`: no traceback."""
    command = [sys.executable, "-m", "mmmamba", "info", str(tiny_dir)]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["chat", "--model", "{tiny}", "--temperature", "11", "Hi"], ["temperature", "11", "0 to 10"]),
        (["chat", "--model", "{tiny}", "--max-new-tokens", "0", "Hi"], ["max_new_tokens", "1 or more"]),
        (["chat", "--model", "{tiny}", "--max-tiles", "0", "--image", "{picture}", "Hi"], ["max_tiles"]),
        (["chat", "--model", "{tiny}", "--top-k", "many", "Hi"], ["--top-k", "many"]),
        (["chat", "--model", "{tiny}", "--image", "gone.jpg", "Hi"], ["gone.jpg"]),
        (["chat", "--model", "{tiny}", "--image", __file__, "Hi"], [__file__, "not an image"]),
        (["chat", "--model", "{tiny}", "--device", "tpu", "Hi"], ["tpu", "cpu"]),
        (["chat", "--model", "{tiny}", "--device", "cuda:99", "Hi"], ["cuda:99", "--device cpu"]),
        (["chat", "--model", "{tiny}", " "], ["question", "empty"]),
        (["chat", "--model", "no-such-model", "Hi"], ["no-such-model", "nano"]),
        (["chat", "--model", "{empty}", "Hi"], ["config.json"]),
        (["chat", "--model", "{tiny}", "--quantize", "int2", "Hi"], ["int2", "int4"]),
        (["chat", "--precision", "int4", "--quantize", "int8", "Hi"], ["--precision int4", "--quantize int8"]),
        (["chat", "--precision", "float32", "--dtype", "float16", "Hi"], ["--precision float32", "--dtype float16"]),
        (["info", "{tiny}", "--context", "0"], ["--context 0"]),
        (["info", "{tiny}", "--context", "5", "--image-tokens", "6"], ["--image-tokens 6"]),
        (["translate"], ["translate", "--help"]),
        ([], ["--help"]),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(
    capsys: pytest.CaptureFixture[str],
    tiny_dir: Path,
    picture: Path,
    tmp_path: Path,
    argv: list[str],
    names: list[str],
) -> None:
    status, out, err = run(capsys, *(a.format(tiny=tiny_dir, picture=picture, empty=tmp_path) for a in argv))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    for name in names:
        assert name in err


def test_out_of_memory_says_what_to_lower(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_dir: Path
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(cli, "load_model", full)
    status, _, err = run(capsys, "chat", "--model", tiny_dir, "Hi")
    assert status == 2
    assert "--max-tiles" in err


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch, tiny_dir: Path) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cli, "load_model", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["chat", "--model", str(tiny_dir), "Hi"])


@pytest.mark.parametrize("layout", ["post", "pre_ntk"])
@pytest.mark.parametrize("kind", KINDS)
def test_cost_model_counts_what_is_there(golden: Path, layout: str, kind: str) -> None:
    """Parameters, state and cache by arithmetic equal those of real tensors."""
    model = load_model(golden / layout / kind)
    config = model.config
    table = config.language.vocab_size * config.language.hidden_size
    counted, real = cost.count_parameters(config), cost.weight_bytes(model)
    assert real.total == 4 * (counted.total - table)  # the published table that nobody reads is not loaded
    assert real.per_token == 4 * counted.per_token

    state = model.new_state()
    tiles = torch.zeros(1, 3, config.image_size, config.image_size)
    image = [config.embedding.img_context_token_id] * config.tokens_per_tile
    ids = torch.tensor([[*range(3, 23), *image]])
    model(ids, tiles, state)
    held: dict[str, int] = {"mamba2": 0, "mha": 0}
    for stack in state.stacks:
        for layer in stack.layers:
            for name, tensor in layer.tensors().items():
                if name.endswith("_cache"):  # grown in blocks: count the filled part
                    held["mha"] += tensor[:, :, : stack.seqlen].nbytes
                else:
                    held["mamba2"] += tensor.nbytes
    assert cost.state_bytes(config) == held["mamba2"]
    kv = cost.kv_cache_bytes(config, num_text_tokens=20, num_image_tokens=config.tokens_per_tile)
    assert kv == held["mha"]


def test_weight_bytes_count_a_tied_table_once(golden: Path) -> None:
    model = load_model(golden / "post" / "linear")
    before = cost.weight_bytes(model)
    table = model.embedding.text.weight
    model.language.output.weight = table
    after = cost.weight_bytes(model)
    assert after.total == before.total - table.nbytes
    assert after.per_token == before.per_token


def test_info_agrees_with_the_cost_model(capsys: pytest.CaptureFixture[str], golden: Path) -> None:
    path = golden / "post" / "hybrid"
    ask = ("info", path, "--context", 1000, "--image-tokens", 100, "--dtype", "bfloat16")
    status, out, err = run(capsys, *ask, "--json")
    assert (status, err) == (0, "")
    record = json.loads(out)
    config = read_config(path)
    teacher = read_config(golden / "post" / "hovle")
    tokens = {"num_text_tokens": 900, "num_image_tokens": 100, "element_bytes": 2}
    assert record["kind"] == "hybrid"
    assert record["teacher_kv_bytes"] == cost.kv_cache_bytes(teacher, **tokens) > record["kv_bytes"]
    assert record["kv_bytes"] == cost.kv_cache_bytes(config, **tokens) > 0
    assert record["parameters"] == cost.count_parameters(config).total
    text = run(capsys, *ask)[1]
    assert "8 layers: 1 mha, 3 mamba2, 1 mha, 3 mamba2" in text
    assert f"{record['parameters']:,}" in text
    assert "1,000 tokens, 100 of them image tokens" in text


def test_a_turn_cancelled_while_it_is_read_leaves_no_trace(tiny_dir: Path) -> None:
    chat = Conversation(load_model(tiny_dir))
    cancel = threading.Event()
    cancel.set()
    events = list(chat.ask("one " * 50, cancel=cancel))
    assert [event.finish_reason for event in events] == ["cancel"]
    assert (chat.state.seqlen, chat.num_turns) == (0, 0)
