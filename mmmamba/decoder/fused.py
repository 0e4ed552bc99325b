"""The fused decoder of one model: its weights, and workspaces for the conversations that are being decoded."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmmamba.decoder.layers import Unsupported, gather
from mmmamba.decoder.reading import PromptReader
from mmmamba.decoder.session import Binding, Session
from mmmamba.decoder.workspace import BUCKETS, Workspace, bucket_of
from mmmamba.kernels.sampler import MAX_STOPS
from mmmamba.model import MMMamba
from mmmamba.sampling import SamplingParams
from mmmamba.state import DecodeState


class FusedDecoder:
    """Decodes from a frozen model's weights, which it shares. Not for use from several threads at once.

    Workspaces are kept by their number of rows and used again, so a thousand sessions need the memory of as many as
    are open at once, and graphs are captured once.

    Args:
        overlap: let kernels start before the ones ahead of them end, on cards that can.
        one_launch: rows of the workspaces (up to `FEW_ROWS`) that take one launch a token.
    Raises: Unsupported if the kernels cannot run this model.
    """

    def __init__(self, model: MMMamba, *, overlap: bool = True, one_launch: tuple[int, ...] = ()) -> None:
        self.overlap, self.one_launch = overlap, one_launch
        self.layers = gather(model)
        self.device = model.device
        self._fingerprint = model.config.fingerprint()
        self._image_id = model.config.embedding.img_context_token_id
        self._free: dict[int, list[Workspace]] = {}
        self._reader = PromptReader()

    # --- prompts ---

    def read(self, model: MMMamba, input_ids: Tensor, pixel_values: Tensor | None, state: DecodeState) -> Tensor | None:
        """Read a whole prompt by replaying a graph: logits of its last position (batch, vocab_size), `state` advanced;
        or None, with the state as it was, where the prompt has to be read without one.

        Args: model: the one that this decoder was made from.
        """
        shape = self._reader.shape_of(model, input_ids, pixel_values, state)
        return None if shape is None else self._reader.read(model, input_ids, pixel_values, state, shape)

    # --- sessions ---

    def refuses(self, states: Sequence[DecodeState], stop_token_ids: Sequence[int] = ()) -> str:
        """Why these states cannot be decoded here, or nothing."""
        rows = sum(state.batch for state in states)
        if bucket_of(rows) is None or not rows:
            return f"{rows} rows are to be decoded at once; 1 to {BUCKETS[-1]} can be"
        if len(set(stop_token_ids)) > MAX_STOPS:
            return f"{len(set(stop_token_ids))} stop tokens are more than {MAX_STOPS}"
        for state in states:
            if state.fingerprint != self._fingerprint:
                return "a state belongs to another model"
            if state.pending.device != self.device or state.pending.dtype != self.layers.dtype:
                return f"a state is on {state.pending.device} in {state.pending.dtype}"
            if state.pending.shape[1]:
                return "a state waits for the rest of an image"
            if state.batch > 1 and stop_token_ids:
                return "rows of one state cannot stop one by one"
        return ""

    def open(
        self,
        states: Sequence[DecodeState],
        params: Sequence[SamplingParams],
        *,
        stop_token_ids: Sequence[int] = (),
        banned: Tensor | None = None,
    ) -> Session:
        """Conversations that go on together; to be closed.

        Args:
            states: advanced in place, of any lengths; a state of several rows is as many rows.
            params: how each state's tokens are drawn. Draws differ from those of `sampling.sample` with the same seed,
                not in their distribution; greedy ones are equal.
            banned: (vocab_size,) bool, tokens never to be drawn.
        Raises: Unsupported with what `refuses` says.
        """
        if reason := self.refuses(states, stop_token_ids):
            raise Unsupported(reason)
        space = self._take(sum(state.batch for state in states))
        with torch.inference_mode(False):  # what a session allocates may be used outside of that mode
            session = Session(space, states, params, stop_token_ids, banned, self._give_back)
        space.owner = session
        return session

    def reserve(self, rows: int) -> None:
        """Memory and code for sessions of so many rows, so that opening one cannot fail for want of them."""
        self._give_back(self._take(rows))

    def _take(self, rows: int) -> Workspace:
        bucket = bucket_of(rows)
        assert bucket is not None, "`refuses` was asked"
        free = self._free.setdefault(bucket, [])
        if free:
            return free.pop()
        with torch.inference_mode(False):  # tensors made in that mode could not be written to outside of it
            one_launch = bucket in self.one_launch
            return Workspace(self.layers, bucket, self.device, overlap=self.overlap, one_launch=one_launch)

    def _give_back(self, space: Workspace) -> None:
        self._free[space.rows].append(space)

    # --- single tokens ---

    def fits(self, token: Tensor, state: DecodeState) -> bool:
        """Whether `decode_one_token` can take this call. (A token on the device is not looked at: that would wait.)"""
        if token.shape != (state.batch,) or self.refuses([state]):
            return False
        return token.is_cuda or not bool((token == self._image_id).any())

    @torch.inference_mode()
    def decode_one_token(self, token: Tensor, state: DecodeState, *, graph: bool = True) -> Tensor:
        """As `generate.decode_one_token`: tokens (batch,), logits (batch, vocab_size); advances `state`.

        Args: graph: replay a CUDA graph, made at the first call, rather than launch kernel by kernel.
        """
        space = self._take(state.batch)
        try:
            binding = Binding(space, [state])
            binding.make_room()
            binding.write_seqlens()
            binding.write_frequencies()
            space.draws.alive.copy_(binding.by_row([(1,)], torch.int32)[0])
            space.draws.token[: state.batch].copy_(token, non_blocking=True)
            if graph:
                space.run(None)
            else:
                space.launch(None)
            for stack in state.stacks:
                stack.seqlen += 1
            space.check()  # of the calls before: this one has only been launched
            return space.logits[: state.batch].clone()
        finally:
            self._give_back(space)
