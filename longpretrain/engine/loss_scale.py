"""The loss scale of fp16: plain numbers for a checkpoint, and two corrections of DeepSpeed's.

fp16 gradients are computed times a scale, so that small ones do not vanish. A gradient that is too
large for fp16 then skips its update and halves the scale; a thousand updates without one double it.

Corrected (0.19.8):

* The scale grows after an update. DeepSpeed lets it grow between a gradient and its use, which is
  then divided by twice the scale that it was computed with.
* At the smallest scale a non-finite gradient skips its update as at any other. DeepSpeed raises a
  plain exception there; ``optim.max_skipped`` says when a run ends.
"""

from __future__ import annotations

from typing import Any

from longpretrain.errors import InputError

_NEVER = 2**62
_KINDS = {"cur_scale": float, "cur_iter": int, "last_overflow_iter": int, "cur_hysteresis": int}


class LossScale:
    """Over DeepSpeed's dynamic scaler, which still halves the scale.

    Args:
        scaler: a ``DynamicLossScaler``; it belongs to an engine.
    """

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler
        self._window = int(scaler.scale_window)
        scaler.scale_window = _NEVER
        scaler.raise_error_at_min_scale = False

    @property
    def value(self) -> float:
        """What the next loss is multiplied with."""
        return float(self._scaler.cur_scale)

    def after_update(self) -> None:
        """Doubles the scale where that is due; to be called after every update, skipped ones
        included.
        """
        scaler = self._scaler
        clean = scaler.cur_iter - 2 - scaler.last_overflow_iter  # DeepSpeed has counted this one
        if clean > 0 and clean % self._window == 0:
            scaler.cur_hysteresis = scaler.delayed_shift
            scaler.cur_scale *= scaler.scale_factor

    def state(self) -> dict[str, float]:
        """All that moves, under DeepSpeed's names: a run that is given it goes on with the same
        scales.
        """
        return {key: kind(getattr(self._scaler, key)) for key, kind in _KINDS.items()}

    def restore(self, state: Any) -> None:
        """Goes on from another's ``state()``.

        Raises:
            InputError: it is no such state.
        """
        fits = isinstance(state, dict) and state.keys() == _KINDS.keys()
        if not fits or not all(type(state[key]) in (int, kind) for key, kind in _KINDS.items()):
            raise InputError(
                "loss_scaling of the checkpoint",
                got=state,
                wanted=f"numbers {', '.join(_KINDS)}",
                way_out="The checkpoint is damaged: point checkpoints/latest at an older one.",
            )
        for key, kind in _KINDS.items():
            setattr(self._scaler, key, kind(state[key]))
