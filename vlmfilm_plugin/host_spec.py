"""What a host adapter tells us about a host: the pluggy hook `vlmfilm_host` and the records it returns.

A host adapter describes, it does not patch: class by class it names what to watch, and the core does the wrapping. So a host adapter needs
no torch and cannot forget to undo, to keep a signature, or to fail closed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pluggy

PROJECT = "vlmfilm"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

PHASES = ("train", "val", "test", "predict")


@dataclass(frozen=True)
class RowView:
    """One UNet forward, as a row mapping sees it.

    Attributes:
        phase: `train`, `val`, `test` or `predict`.
        samples: B, the number of samples of the running batch.
        rows: R, the number of rows the UNet was called with.
        image: the batch's image tensor (B, C, H, W).
        condition: the condition image the UNet was called with (R, C, h, w), or None where it has none.
        known: the condition image of the first forward of this batch, and the sample of each of its rows; None in that forward.
    """

    phase: str
    samples: int
    rows: int
    image: Any
    condition: Any
    known: tuple[Any, Sequence[int]] | None = None


# (B samples, R rows) -> the sample of each row, or None where that cannot be known: then the run stops with an error.
RowMap = Callable[[RowView], Sequence[int] | None]


def same_rows(view: RowView) -> Sequence[int] | None:
    """Map row i to sample i, and every row to the one sample of a batch of one."""
    if view.rows == view.samples:
        return range(view.rows)
    return [0] * view.rows if view.samples == 1 else None


def rows_seen_before(view: RowView) -> tuple[bool, Sequence[int] | None]:
    """Find each row's condition image among those of the batch's first forward: a host may call its UNet again on some rows, permuted.

    Returns:
        Whether any row was among them; and the sample of each, or None where a row was not, or is that of two samples alike.
    """
    if view.known is None or view.condition is None or view.known[0].shape[1:] != view.condition.shape[1:]:
        return False, None
    condition, samples = view.known
    if view.condition is condition:
        return True, samples
    found = [{samples[place] for place, same in enumerate((condition == row).flatten(1).all(1).tolist()) if same} for row in view.condition]
    return any(found), [next(iter(each)) for each in found] if all(len(each) == 1 for each in found) else None


def own_class(module: ModuleType, name: str) -> Any:
    """Return the class of this name that a module defines itself; None where it imports it, or has none."""
    value = vars(module).get(name)
    return value if inspect.isclass(value) and value.__module__ == module.__name__ else None


def has_arguments(cls: Any, method: str, names: set[str]) -> bool:
    """Tell whether a class has a method with arguments of these names."""
    function = getattr(cls, method, None)
    return function is not None and names <= set(inspect.signature(function).parameters)


def by_resolution(paths: Sequence[str], begins: Iterable[bool]) -> list[list[str]]:
    """Group blocks in order of execution, as `UNet.stages` wants them: one begins a stage where `begins` says that it has another resolution."""
    stages: list[list[str]] = []
    for path, is_new in zip(paths, begins, strict=True):
        if is_new or not stages:
            stages.append([])
        stages[-1].append(path)
    return stages


def one_each(container: str, blocks: Sized) -> list[str]:
    """Return the stages of a decoder whose every part in a list of modules has a resolution of its own: `ups.0`, `ups.1`, ..."""
    return [f"{container}.{number}" for number in range(len(blocks))]


def first_argument(arguments: Mapping[str, Any]) -> Any:
    """Return a step method's first argument after self: the batch, in Lightning."""
    return next(iter(arguments.values()))


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Where a host holds the mask that its UNet is about, for spatial gates; None is "not stated", and a gate that needs it is refused.

    Functions of a module, not lambdas: they are copied and pickled with the UNet.

    Attributes:
        state: the UNet's input x (R, C, H, W), as `UNet.x` says -> the mask in it (R, 1, H, W), in [0, 1].
        prediction: what the UNet's forward returns -> the logits of its mask (R, 1, H, W): their sigmoid is the mask.
        truth: the batch -> its ground truth (B, 1, H, W), in [0, 1].
    """

    state: Callable[[Any], Any] | None = None
    prediction: Callable[[Any], Any] | None = None
    truth: Callable[[Any], Any] | None = None


# Module paths as in `named_modules()`: a pattern, several of them, or a function of the built UNet that returns paths. In a pattern `*` stands
# for one component or a part of one, `**` for any number of components, and `re:` begins a regular expression of the whole path.
Paths = str | Sequence[str] | Callable[[Any], Sequence[str]]

# The decoder's stages, bottleneck first; each is a pattern or several, in order of execution. Or a function of the built UNet that returns them.
Stages = Sequence[str | Sequence[str]] | Callable[[Any], Sequence[str | Sequence[str]]]

# C of a block's output: for all blocks, by path (or pattern), or as a function of the block.
Channels = int | Mapping[str, int] | Callable[[Any], int]

# A value in a call of the UNet: the name of an argument of `forward`, or a function of the arguments by name, those that were given.
OfCall = str | Callable[[Mapping[str, Any]], Any]

BLOCKS = ("all", "last")


@dataclass(frozen=True, kw_only=True)
class UNet:
    """A UNet class: FiLM is attached when its `__init__` returns.

    Nothing has run by then: what is stated here, and what is read off the blocks where it is not, is verified in the first forward, which
    stops the run where it differs. Functions are functions of a module, not lambdas: they may be copied and pickled with the UNet.

    Attributes:
        cls: the class.
        targets: apply point -> the blocks whose output is modulated: `{"post_block2": "ups.*.1"}`. None of them lies inside another.
        stages: which blocks are one decoder stage. A stage is a resolution: its blocks have one spatial size, stage 0 is next to the
            bottleneck, each further one is larger. A block belongs to the stage that names it, or a module around it: with targets
            `ups.*.resnets.*`, `["ups.0", "ups.1"]` are two stages. Every block belongs to exactly one stage, and every stage has one; a stage's
            blocks are in order of execution. None: each block is a stage, where the paths are plainly numbered from the bottleneck: they
            differ in one component, which counts 0, 1, 2, ...; anything else is refused, as no order can be read off it.
        blocks: which blocks of a stage carry FiLM, each with a head of its own: `all`, or its `last`. The setting `blocks` wins.
        channels: C, the channels of a block's output. None reads them off blocks of one convolution, and off `block2.proj` in a ResnetBlock
            of the MedSegDiff kind; of others they are not guessed.
        rank: the number of spatial dimensions of a block's output, 1 to 3; tokens (B, N, C) have one. None reads it off the block's
            convolutions, which must be of one rank.
        channel_axis: 1 for (B, C, ...), -1 for (B, ..., C). None is 1 for blocks with convolutions, where the first forward bears it out: one
            in which the last axis could be meant as well is refused; of other blocks it must be stated.
        output: which element of a block's output is modulated: index in a tuple or list, key of a mapping, name of a dataclass's field.
            None: the output is a tensor.
        x: the UNet's input (R, ...), by whose rows features are mapped; None is the first argument of `forward`.
        condition: the condition image (R, C, H, W), or None where it has none: `"cond"`, or a function for `x[:, :-1]`.
        own_condition: name of the argument of `forward` through which FiLM of the host's own is conditioned, or None: a UNet that carries
            the plugin's FiLM and is called with one stops the run, since two would act.
        own_film: built UNet -> how to use the plugin's FiLM instead, in a sentence, where its class applies FiLM itself; such a UNet is
            left to its owner. Not asked for a UNet that is built inside a `Model` with an `own_film`: the model decides.
        masks: where the mask is that spatial gates look at, which need blocks of rank 2.
    """

    cls: type
    targets: Mapping[str, Paths]
    stages: Stages | None = None
    blocks: str = "all"
    channels: Channels | None = None
    rank: int | None = None
    channel_axis: int | None = None
    output: int | str | None = None
    x: OfCall | None = None
    condition: OfCall | None = "cond"
    own_condition: str | None = None
    own_film: Callable[[Any], str | None] | None = None
    masks: Masks = Masks()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model class that may apply FiLM itself.

    Attributes:
        cls: the class.
        own_film: bound arguments of `__init__` without self, defaults filled in -> how to use the plugin's FiLM instead, in a sentence,
            where a model built so applies FiLM itself; such a model is left to its owner. None: the plugin's acts.
    """

    cls: type
    own_film: Callable[[Mapping[str, Any]], str | None] | None = None


@dataclass(frozen=True, kw_only=True)
class Steps:
    """Methods that handle one batch: the batch is published while they run.

    Attributes:
        cls: the class that has them.
        phases: method name -> phase (`train`, `val`, `test`, `predict`), or a function of the instance that returns it.
        value_range: (low, high) of the batch's image tensor.
        batch: the method's bound arguments without self -> the batch, a mapping with the image tensor (B, C, H, W) at `image`.
        rows: which sample each row of a UNet forward belongs to.
        loaded: the method's bound arguments without self -> the images as the data loader gave them (B, ...), by which the row ledger knows
            the rows; None: the batch's own `image`.
        is_whole: whether the tensors are whole images, neither cropped nor augmented: then their pixels stand for files that cannot be
            read as images.
    """

    cls: type
    phases: Mapping[str, str | Callable[[Any], str]]
    value_range: tuple[float, float]
    batch: Callable[[Mapping[str, Any]], Any] = first_argument
    rows: RowMap = same_rows
    loaded: Callable[[Mapping[str, Any]], Any] | None = None
    is_whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Config:
    """A method that receives the host's configuration; `read` turns its bound arguments without self into settings.

    Attributes:
        resume: bound arguments -> path of a checkpoint that the models built afterwards will resume from, or None.
    """

    cls: type
    method: str
    read: Callable[[Mapping[str, Any]], Mapping[str, object]]
    resume: Callable[[Mapping[str, Any]], str | None] | None = None


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """A data set class that knows the untouched file behind each sample's name (`batch["name"]`).

    Attributes:
        cls: the class; it is asked when its `__init__` returns.
        read: the built data set -> (name, path) pairs. One name with two paths stands for neither.
    """

    cls: type
    read: Callable[[Any], Iterable[tuple[str, str]]]


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """What one module of a host contributes. Return it from `vlmfilm_host`.

    Attributes:
        name: the host's name in messages.
        unets: UNet classes of this module.
        steps: classes of this module with methods that handle a batch.
        models: classes whose instances must contain FiLM once built (a run that was asked to be FiLM never goes on as a baseline), as
            they are or as a `Model`; Lightning modules among them also save and check FiLM's metadata in their checkpoints.
        configs: methods of this module that receive the host's configuration.
        image_files: data set classes of this module.
        recompute: names in this module that hold a checkpoint function of the host's own, called with the function to run again first;
            `torch.utils.checkpoint` needs no mention.
        choose_image: of several files that were opened for one item (modalities, say) and may each be its image: the one that is, or None.
        is_library: the module is part of a library that is imported for many purposes, and says nothing of what the run trains: nothing
            happens before a UNet of it is built. One gets FiLM unless a host with a host adapter of its own was recognised; of several, those
            get it that train, or whose FiLM was loaded: a frozen teacher beside them stays plain.
        windows: names of functions of a library's module that cut their first argument (B, ...) into windows and call a UNet on several of
            them at once: with FiLM they take one image at a time, since rows of one call may be windows of several.
    """

    name: str
    unets: Sequence[UNet] = ()
    steps: Sequence[Steps] = ()
    models: Sequence[type | Model] = ()
    configs: Sequence[Config] = ()
    image_files: Sequence[ImageFiles] = ()
    recompute: Sequence[str] = field(default=())
    choose_image: Callable[[Sequence[str]], str | None] | None = None
    is_library: bool = False
    windows: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class SourceImage:
    """One image of a data set, as a batch of it alone would name it.

    Attributes:
        path: the untouched file.
        fields: what a batch of this one image holds beside it, the source of its cache key: `{"name": ["train/image/0001.png"]}`.
    """

    path: str
    fields: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a host's configuration says before a run: its images and its settings. Return it from `vlmfilm_listing`.

    Attributes:
        host: the host's name in messages.
        images: of the wanted splits.
        settings: FiLM settings in the configuration, as `Config.read` would return them.
        resume: the checkpoint that the run will resume from, or None.
    """

    host: str
    images: Sequence[SourceImage]
    settings: Mapping[str, object] = field(default_factory=dict)
    resume: str | None = None


@hookspec
def vlmfilm_host(module: ModuleType) -> HostSpec | None:
    """Describe `module` when it is part of your host, judged by its structure, else return None.

    Called once for each host module named in the entry-point group `vlmfilm.hosts`, when its import has finished.
    """


@hookspec
def vlmfilm_listing(config: Mapping[str, Any], splits: Sequence[str]) -> Listing | None:
    """List the source images of `splits` when `config` is a configuration of your host, judged by its structure, else return None.

    Optional; `vlmfilm warmup --config` needs it. Relative paths are relative to the working directory. No host module is imported.
    """
