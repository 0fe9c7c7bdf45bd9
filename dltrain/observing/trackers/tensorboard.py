"""TensorBoard: event files in RUN/tensorboard, written without torch or TensorFlow.

trackers: {tensorboard: {}}                  # tensorboard --logdir runs
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from dltrain.artifact import Artifact
from dltrain.observing.journal import is_local
from dltrain.observing.trackers.base import TrackedRun, flat
from dltrain.spec import TensorboardSpec
from dltrain.store import open_store

__all__ = ["Tensorboard"]

# An object can't be appended to: it is written anew when it has grown by so much.
_GROWTH, _UPLOAD_SECONDS = 1.25, 30.0


class Tensorboard:
    """One event file for each start of the run; what an earlier one has of later steps is declared void."""

    name = "TensorBoard"

    def __init__(self, spec: TensorboardSpec) -> None:
        self._spec = spec
        self._writer: Any = None
        self._uploaded, self._upload_at = 0, 0.0

    def start(self, run: TrackedRun) -> int:
        self._run = run
        self._target = open_store(self._spec.dir).child(run.name) if self._spec.dir else run.store.child("tensorboard")
        self._temporary = None if is_local(self._target) else tempfile.TemporaryDirectory(prefix="dltrain-tensorboard-")
        return -1

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]))

    def artifact(self, step: int, name: str, artifact: Artifact) -> None:
        kind = artifact.media_type.partition("/")[0]
        if kind == "image":
            value = Summary.Value(tag=name, image=Summary.Image(encoded_image_string=artifact.data))
        elif artifact.media_type == "audio/wav":
            sound = Summary.Audio(encoded_audio_string=artifact.data, content_type="audio/wav")
            value = Summary.Value(tag=name, audio=sound)
        elif kind == "text":
            value = _text(name, artifact.data)
        else:
            return
        self._add(step, Summary(value=[value]))

    def flush(self) -> None:
        if self._writer:
            self._writer.flush()
            self._upload(False)

    def close(self, status: str) -> None:  # noqa: ARG002 - event files have no place for it
        if self._writer:
            self._writer.close()
            self._upload(True)
        if self._temporary:
            self._temporary.cleanup()

    # ---- inside ----

    def _add(self, step: int, summary: Any) -> None:
        if self._writer is None:
            self._open()
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

    def _open(self) -> None:
        self._directory = Path(self._temporary.name if self._temporary else self._target.root)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(self._directory))
        void, begin = SessionLog(status=SessionLog.START), self._run.begin
        self._writer.add_event(Event(wall_time=time.time(), step=begin + 1, session_log=void))
        settings = "\n".join(f"    {name}: {value}" for name, value in flat(self._run.spec))
        self._add(begin + 1, Summary(value=[_text("spec", settings.encode())]))

    def _upload(self, force: bool) -> None:
        """To object storage, the more seldom the larger it is."""
        if not self._temporary:
            return
        for file in self._directory.iterdir():
            size, now = file.stat().st_size, time.monotonic()
            if force or (size > _GROWTH * self._uploaded and now - self._upload_at > _UPLOAD_SECONDS):
                self._target.write(file.name, file.read_bytes())
                self._uploaded, self._upload_at = size, now


def _text(tag: str, text: bytes) -> Any:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    tensor = TensorProto(dtype=DT_STRING, string_val=[text], tensor_shape=shape)
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
