"""Encode a data set before training: many images, several processes, one store; what is stored already costs a look-up.

Reading and decoding run ahead of the encoder in threads, bounded in images and in bytes. One transaction a batch: a killed run loses at
most the batch that was being encoded. A bad image is noted and the others go on.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from PIL import Image

from vlmfilm_plugin.checkpoints.facts import resolve_with
from vlmfilm_plugin.checkpoints.peek import peek
from vlmfilm_plugin.errors import EncoderError, FeatureError, ImageReadError, Interrupted, UnsteadyEncoderError, VlmFilmError
from vlmfilm_plugin.features.images import open_image
from vlmfilm_plugin.features.provider import FeatureProvider
from vlmfilm_plugin.features.samples import Sample
from vlmfilm_plugin.features.store.protocol import SourceStamp
from vlmfilm_plugin.settings.arguments import signature_with_settings
from vlmfilm_plugin.settings.record import Settings
from vlmfilm_plugin.warmup.image_list import Plan, read_plan, samples_of
from vlmfilm_plugin.warmup.processes import Ranks, WarmupProgress, WarmupReport

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from typing_extensions import Unpack

    from vlmfilm_plugin.settings.arguments import SettingsArguments

BATCH = 64
_LOOK_AHEAD = 512  # keys a look-up in the store
_BYTES_READ_AHEAD = 512 << 20  # of decoded images in a group; two groups are in memory at once

Read = tuple[Sample, SourceStamp, "Picture"]


def warmup_vlm_cache(
    config: str | os.PathLike[str] | Mapping[str, Any],
    splits: Sequence[str] = ("train", "val", "test"),
    *,
    show_progress: bool = True,
    **settings: Unpack[SettingsArguments],
) -> WarmupReport:
    """Encode every image of a data set into the feature store, under the keys that training looks up.

    Under `torchrun` or `accelerate launch` every process takes its share of the images; all return the same report.

    Args:
        config: the host's YAML file or its content, a folder, or a list of images (see `image_list.read_plan`).
        splits: which splits to encode.
        show_progress: a bar on stderr for each process.
        settings: any setting by name; stronger than the environment and the host's configuration.

    Raises:
        SettingsError, HostError: the source cannot be listed, or a setting is wrong.
        Interrupted: Ctrl-C; what was encoded is stored.
        EncoderError: the encoder cannot be loaded. StoreError: the store cannot be written.
    """
    return warm_up(config, splits, dict(settings), show_progress=show_progress)


warmup_vlm_cache.__signature__ = signature_with_settings(warmup_vlm_cache)  # type: ignore[attr-defined]


def warm_up(
    source: str | os.PathLike[str] | Mapping[str, Any],
    splits: Sequence[str],
    settings: Mapping[str, object],
    *,
    as_split: str | None = None,
    batch_size: int = BATCH,
    readers: int | None = None,
    shard_files: bool = False,
    show_progress: bool = True,
) -> WarmupReport:
    """Do what `warmup_vlm_cache` says, with the options of the command line.

    Args:
        as_split: the split in the keys of a folder or list.
        batch_size: images a transaction; a killed run loses at most these.
        readers: threads that read images; default: the number of cores, 8 at most.
        shard_files: write one store a process, in `cache_dir`/shard-..., for `vlmfilm cache merge`: where processes share no local disk.
    """
    plan = read_plan(source, splits, as_split)
    ranks = Ranks.join()
    resolved = _settings(plan, settings)
    if shard_files:
        folder = f"shard-{ranks.index:05d}-of-{ranks.count:05d}"
        resolved = replace(resolved, cache_dir=os.path.join(resolved.cache_dir, folder))
    if (device := ranks.device(resolved.device_map)) is not None:
        resolved = replace(resolved, device_map=device)
    samples = samples_of(plan, resolved.dataset_root)
    features = FeatureProvider.from_settings(resolved)
    features.check_range(sample.path for sample in samples)
    mine = ranks.share(samples)
    with closing(features.store), WarmupProgress(ranks, len(mine), show_progress) as progress:
        warmup = _Warmup(features, batch_size, readers or min(8, os.cpu_count() or 1), progress)
        try:
            report = warmup.run(mine)
        except KeyboardInterrupt as stop:
            raise Interrupted(_stored(warmup.report, ranks)) from stop
    return report.merged(ranks.others(report))


def _stored(report: WarmupReport, ranks: Ranks) -> str:
    share = "" if ranks.count == 1 else f" of the share of process {ranks.index} of {ranks.count}"
    stored = f"{report.hits + report.encoded} of {report.total} images{share} are stored in {', '.join(report.stores)}"
    return f"{stored}; the same command goes on from there"


def _settings(plan: Plan, given: Mapping[str, object]) -> Settings:
    return resolve_with(peek(plan.resume), os.environ, host=plan.settings, arguments=given)


class _Warmup:
    """One process's share of a warm-up."""

    def __init__(self, provider: FeatureProvider, batch_size: int, readers: int, progress: WarmupProgress) -> None:
        self._provider, self._batch_size, self._progress = provider, batch_size, progress
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="vlmfilm-read")
        self.report = WarmupReport(stores=[str(provider.store.path)])

    def run(self, samples: Sequence[Sample]) -> WarmupReport:
        """Encode what is missing: while a group is encoded, the next one is read."""
        start = time.monotonic()
        self.report.total = len(samples)
        ahead: list[Future[Read]] = []
        try:
            # `read_image` sets warning filters for a moment, and threads may leave each other's behind.
            with warnings.catch_warnings():
                for group in self._groups(samples):
                    reading = [self._pool.submit(_read, sample) for sample in group]
                    self._finish(ahead)
                    ahead = reading
                self._finish(ahead)
        finally:
            self._pool.shutdown(cancel_futures=True)
        self.report.seconds = time.monotonic() - start
        return self.report

    def _groups(self, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        """Yield missing samples, bounded by images and by bytes."""
        group: list[Sample] = []
        held = 0
        for sample in self._missing(samples):
            try:
                size = _decoded_bytes(sample)
            except ImageReadError as error:
                self._fail(sample, error)
                continue
            if group and (len(group) >= self._batch_size or held + size > _BYTES_READ_AHEAD):
                yield group
                group, held = [], 0
            group.append(sample)
            held += size
        if group:
            yield group

    def _missing(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        for start in range(0, len(samples), _LOOK_AHEAD):
            part = []
            for sample in samples[start : start + _LOOK_AHEAD]:
                if sample.path is not None and sample.path.is_file():
                    part.append(sample)
                else:
                    facts = {"file": sample.path, "expected": "an image file"}
                    self._fail(sample, ImageReadError(f"cannot read image {sample.path}", facts, "correct the path, or restore the file"))
            found = self._provider.find(part)
            self.report.hits += len(found)
            self._progress.add(hits=len(found))
            yield from (sample for sample in part if sample.image not in found)

    def _finish(self, reading: Sequence[Future[Read]]) -> None:
        read: list[Read] = []
        for future in reading:
            try:
                read.append(future.result())
            except _BadImage as bad:
                self._fail(bad.sample, bad.error)
        self._encode(read)

    def _encode(self, read: Sequence[Read]) -> None:
        """Encode and store; where a batch fails, halves of it, so that one bad image costs itself alone."""
        if not read:
            return
        try:
            self._provider.encode([sample for sample, _, _ in read], [stamp for _, stamp, _ in read], [picture for _, _, picture in read])
        except (EncoderError, FeatureError) as error:
            if isinstance(error, UnsteadyEncoderError) or (
                isinstance(error, EncoderError) and not self._provider.encoder.is_loaded and not self.report.encoded
            ):
                raise  # no image is to blame: the encoder itself cannot be loaded, or used
            if len(read) == 1:
                self._fail(read[0][0], error)
                return
            middle = len(read) // 2
            self._encode(read[:middle])
            self._encode(read[middle:])
            return
        self.report.encoded += len(read)
        self._progress.add(encoded=len(read))

    def _fail(self, sample: Sample, error: Exception) -> None:
        said = " ".join(str(error).split())
        if isinstance(error, VlmFilmError):
            facts = [f"{label} {value}" for label, value in error.facts.items() if label != "file"]
            said = " ".join("; ".join([error.headline, *facts, *([error.fix] if error.fix else [])]).split())
        self.report.failures.append((str(sample.path), f"{type(error).__name__}: {said}"))
        self._progress.add(failed=1)


class _BadImage(Exception):
    def __init__(self, sample: Sample, error: Exception) -> None:
        super().__init__(str(error))
        self.sample, self.error = sample, error


def _read(sample: Sample) -> Read:
    assert sample.path is not None
    try:
        # Stamp before reading: a file replaced in between is then noticed at the next look.
        return sample, SourceStamp.of(sample.path), sample.load()
    except Exception as error:  # decoders raise anything on a damaged file; it must not stop the others
        raise _BadImage(sample, error) from error


def _decoded_bytes(sample: Sample) -> int:
    """Return the size of the image in memory, from its header alone; 0 where that cannot be read (the reader says why).

    Raises:
        ImageReadError: the image has too many pixels; it is not decoded.
    """
    assert sample.path is not None
    limit: int | None = Image.MAX_IMAGE_PIXELS
    try:
        with open_image(sample.path) as opened:
            width, height = opened.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        found = " ".join(str(error).split())
    except Exception:  # whatever is wrong with it, the reader will say
        return 0
    else:
        found = f"{width} x {height} pixels"
        if limit is None or width * height <= limit:
            return 3 * int(width) * int(height)
    facts = {"file": sample.path, "found": found, "expected": f"at most {limit} pixels"}
    raise ImageReadError(f"cannot read image {sample.path}: too large", facts, "shrink the image, or raise PIL.Image.MAX_IMAGE_PIXELS")
