"""Names of the soft-seg port's configurations that have no effect here, and what stands for each: accepted, and said in one line."""

from __future__ import annotations

from collections.abc import Iterator

from vlmfilm_plugin.errors import SettingsError
from vlmfilm_plugin.settings.record import Settings

_OVERLAY = "images are read from their files: `input_mode` is raw"
_READ = "an answer that cannot be read counts as undecided, as with `uniform`"

# Names that are no settings here, whatever their value.
ACCEPTED = {
    "overlay_alpha": _OVERLAY,
    "pred_threshold": _OVERLAY,
    "pred_update_interval_steps": _OVERLAY,
    "pred_warmup_epochs": "FiLM acts from the first step on, as the identity until it is trained, and in evaluation",
    "p2_fallback": _READ,
    "p2_prior_probs": _READ,
}

_ANSWERS = ("logits_feature_mode", "logits_logit_temp", "logits_center", "logits_l2norm", "logits_include_unknown")


def refuse_drawn_predictions(settings: Settings) -> None:
    """Refuse `input_mode: overlay` and `mask_only`.

    Raises:
        SettingsError: the frozen model would be shown the current prediction.
    """
    if settings.input_mode == "raw":
        return
    raise SettingsError(
        f"cannot show the frozen model the current prediction: `input_mode` {settings.input_mode} is not supported",
        {
            "found": f"{settings.input_mode!r}   (from {settings.origin('input_mode')})",
            "reason": "such a feature belongs to one state of training: it cannot be stored under the image's name, found again by "
            "evaluation, or encoded ahead (the port serves the first picture it stored for a name ever after)",
            "expected": "'raw': the image as its file holds it",
        },
        "set `input_mode: raw`; VLM_FILM_INPUT_MODE=raw wins over the host's YAML",
    )


def without_effect(settings: Settings) -> str | None:
    """Return one line that lists every name someone set and that changes nothing here, with what stands for it; None where there is none."""
    found: dict[str, list[str]] = {}
    for name, reason in _idle_names(settings):
        found.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in found.items()) or None


def _idle_names(settings: Settings) -> Iterator[tuple[str, str]]:
    yield from ((name, ACCEPTED[name]) for name in settings.accepted)
    candidates = [
        *_of_strategy(settings),
        *_of_text(settings),
        ("verbose", "the log lines are those of `film_log_every_n_steps_*`"),
        ("verbose_debug", "it prints keys in `VLMConditioner` alone"),
        ("log_every_n_steps", "the log lines are those of `film_log_every_n_steps_*`"),
    ]
    yield from ((name, reason) for name, reason in candidates if _is_asked(settings, name))


def _of_strategy(settings: Settings) -> Iterator[tuple[str, str]]:
    yield "update_interval_steps_eval", "in evaluation every image is conditioned on itself"
    if settings.batch_strategy == "per_sample":
        yield "update_interval_steps_train", "`batch_strategy` per_sample holds no feature over steps"
        yield "reuse_policy", "`batch_strategy` per_sample holds no feature over steps"


def _of_text(settings: Settings) -> Iterator[tuple[str, str]]:
    if not settings.use_text_prompt_cond:
        yield from ((name, "`use_text_prompt_cond` is false") for name in ("prompt_template", "prompt_templates", "max_new_tokens", "pool"))
    if settings.are_answers_asked:
        if settings.logits_center and "center" not in settings.feature_transform:
            yield "logits_center", "`feature_transform` says what is done to features"
        return
    asks_nothing = settings.encoder != "qwen2_5_vl"
    reason = f"encoder {settings.encoder} is asked no prompts" if asks_nothing else "answers are read with `use_text_prompt_cond` alone"
    if settings.use_logits_feature_cond:
        yield "use_logits_feature_cond", reason
        yield from ((name, reason) for name in _ANSWERS)
    else:
        yield from ((name, "`use_logits_feature_cond` is false") for name in _ANSWERS)


def _is_asked(settings: Settings, name: str) -> bool:
    return settings.is_explicit(name) and not settings.origin(name).startswith(("preset", "checkpoint"))
