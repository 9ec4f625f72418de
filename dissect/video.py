"""Pictures from a video file, a camera or a network stream: :class:`Video`, :func:`frames` (PyAV, extra ``[video]``).

Laws: memory does not grow with the length of the video; every picture of a file comes, in order; a file that ends
before it should says so, after all of its good pictures have come.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dissect.errors import VideoError

if TYPE_CHECKING:
    from av import VideoFrame

__all__ = ["Picture", "Video", "frames"]

_LIVE = ("rtsp://", "rtsps://", "rtmp://", "udp://", "rtp://", "tcp://", "srt://")
_TIMEOUT = 10.0  # seconds without data after which a network stream counts as broken
_BACKLOG = 64  # pictures that may wait in memory under late="wait"


@dataclass(frozen=True)
class Picture:
    """One picture of a video: its number in the source, its time in seconds from the first, and its pixels.

    ``image`` is uint8 (H, W, 3) in RGB, turned upright. Numbers that were dropped are missing.
    """

    index: int
    time: float
    image: NDArray[np.uint8]


class Video:
    """An opened source; iterate to get its pictures, once.

    ``source``: the path of a file, a URL, or a camera (``0``, ``"0"``, ``"/dev/video0"``). Cameras and ``rtsp://`` and
    the like are live: a thread of its own reads them, and ``late`` says what happens when pictures are taken more
    slowly than they come: ``"drop"`` keeps only the newest, ``"wait"`` keeps all, so that the lag grows. A file waits.

    ``live``, ``width``, ``height`` and ``rate`` (pictures a second, None if unknown) describe it; while it plays,
    ``dropped`` counts the pictures left out and ``lag`` is how many seconds the last picture given is late.
    Raises :class:`~dissect.errors.VideoError`, at the opening or later, for whatever cannot be read.
    """

    def __init__(self, source: str | int | os.PathLike[str], late: str = "drop") -> None:
        if late not in ("drop", "wait"):
            raise VideoError(f"late is drop or wait, not {late!r}.")
        self.name = os.fspath(source) if not isinstance(source, int) else str(source)
        self.late = late
        self.dropped = 0
        self.lag = 0.0
        self._reader: _Reader | None = None
        self._av = _library()
        camera = self.name.isdigit() or self.name.startswith("/dev/video")
        self.live = camera or self.name.lower().startswith(_LIVE)
        self._container = self._open(camera)
        if not self._container.streams.video:
            kinds = sorted({stream.type for stream in self._container.streams})
            self._container.close()
            raise VideoError(f"{self.name} holds no video, only {' and '.join(kinds) or 'nothing'}.")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.rate = float(rate) if rate else None
        self.width, self.height = self._stream.width, self._stream.height

    def __iter__(self) -> Iterator[Picture]:
        """The pictures, from where the source stands; raises :class:`VideoError` where it breaks."""
        first: float | None = None
        began = 0.0
        numbered = enumerate(self._decoded())
        if self.live:
            self._reader = reader = _Reader(numbered, self.late)
        for index, frame in reader if self.live else numbered:
            moment = self._time(frame, index)
            if first is None:
                first, began = moment, time.monotonic()
            if self.live:
                self.dropped, self.lag = reader.dropped, max(0.0, time.monotonic() - began - (moment - first))
            yield Picture(index, moment - first, _upright(frame))

    def __enter__(self) -> Video:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the source."""
        self.close()

    def close(self) -> None:
        """Close the source; a second time does nothing."""
        if self._reader is not None:
            self._reader.stop()
        self._container.close()

    def _open(self, camera: bool) -> Any:
        """The container of PyAV; raises :class:`VideoError` in words."""
        name, settings = self.name, dict[str, Any]()
        if camera:
            name, settings = _camera(name)
        elif self.name.lower().startswith(("rtsp://", "rtsps://")):
            settings = {"options": {"rtsp_transport": "tcp"}, "timeout": _TIMEOUT}
        elif "://" in self.name:
            settings = {"timeout": _TIMEOUT}
        elif not os.path.exists(name):
            raise VideoError(f"{name} does not exist.")
        elif os.path.isdir(name):
            raise VideoError(f"{name} is a folder, not a video.")
        elif os.path.getsize(name) == 0:
            raise VideoError(f"{name} is empty.")
        try:
            return self._av.open(name, **settings)
        except self._av.error.InvalidDataError as error:
            raise VideoError(
                f"{self.name} is no video that can be read, or a truncated one: an mp4 whose end is missing has lost "
                "its "
                "index. Was its download or its recording cut off?"
            ) from error
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            what = "The camera" if camera else "The stream" if "://" in self.name else "The video"
            raise VideoError(f"{what} {self.name} cannot be opened: {_reason(error)}.") from error

    def _decoded(self) -> Iterator[VideoFrame]:
        """Every frame that the container holds; raises :class:`VideoError` where it breaks off."""
        count = packets = 0
        last: VideoFrame | None = None
        failure: Exception | None = None
        try:
            for packet in self._container.demux(self._stream):
                packets += packet.size > 0
                try:
                    decoded = packet.decode()
                except self._av.error.InvalidDataError:
                    if not self.live:
                        raise
                    continue  # a stream that was entered in the middle: wait for its next key frame
                for frame in decoded:
                    count, last = count + 1, frame
                    yield frame
        except (self._av.error.FFmpegError, OSError) as error:
            failure = error
        if failure is not None:
            try:  # what the decoder still holds is good
                for frame in self._stream.codec_context.decode(None):
                    count, last = count + 1, frame
                    yield frame
            except (self._av.error.FFmpegError, OSError):
                pass
        if failure is not None or self._is_cut_off(packets, last):
            reason = "it ends before its index does" if failure is None else _reason(failure)
            raise VideoError(f"{self.name} broke off after {count} frames: {reason}. Is the file truncated or damaged?")
        if last is None:
            raise VideoError(f"{self.name} holds a video track without a single frame.")

    def _is_cut_off(self, packets: int, last: VideoFrame | None) -> bool:
        """True where a file's index promises more frames, and more time, than have come."""
        stream = self._stream
        if self.live or not stream.frames or packets >= stream.frames or not stream.duration or not stream.time_base:
            return False
        # An edited video may keep frames that are never shown: so the time counts, too.
        end = self._time(last, packets) - float((stream.start_time or 0) * stream.time_base) if last else 0.0
        return end + 3 / (self.rate or 25.0) < float(stream.duration * stream.time_base)

    def _time(self, frame: VideoFrame, index: int) -> float:
        """When the frame is shown, in seconds."""
        return frame.time if frame.time is not None else index / (self.rate or 25.0)


class _Reader:
    """Reads a live source in a thread of its own; iterate to get its numbered frames, the newest alone if so told.

    Iterating raises what broke the source, once everything that came before it was given.
    """

    def __init__(self, source: Iterator[tuple[int, VideoFrame]], late: str) -> None:
        """Start to read ``source``."""
        self.dropped = 0
        self._source, self._keep_all = source, late == "wait"
        self._waiting: deque[tuple[int, VideoFrame]] = deque()
        self._changed = threading.Condition()
        self._ended = self._stopped = False
        self._failure: VideoError | None = None
        self._thread = threading.Thread(target=self._read, name="dissect-video", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, VideoFrame]]:
        """The frames as they come."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if not self._waiting:
                    break
                numbered = self._waiting.popleft()
                self._changed.notify_all()
            yield numbered
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End the thread, and wait for that as long as a silent source may take."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(timeout=2 * _TIMEOUT)

    def _read(self) -> None:
        try:
            for numbered in self._source:
                with self._changed:
                    if self._keep_all:
                        self._changed.wait_for(lambda: self._stopped or len(self._waiting) < _BACKLOG)
                    elif self._waiting:
                        self._waiting.clear()
                        self.dropped += 1
                    if self._stopped:
                        return
                    self._waiting.append(numbered)
                    self._changed.notify_all()
        except VideoError as error:
            self._failure = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()


def frames(source: str | int | os.PathLike[str], late: str = "wait") -> Iterator[Picture]:
    """The pictures of a file, a camera or a network stream, one after another (see :class:`Video`)."""
    with Video(source, late) as video:
        yield from video


def _library() -> ModuleType:
    """PyAV; raises :class:`VideoError` that names the extra where it is missing."""
    try:
        import av
    except ImportError as error:
        raise VideoError("Reading video needs PyAV: pip install 'dissect3d[video]'.") from error
    av.logging.set_level(None)  # its complaints reach the user as errors of ours
    return av


def _camera(name: str) -> tuple[str, dict[str, Any]]:
    """What PyAV wants to hear to open a camera on this system."""
    if sys.platform == "darwin":
        return name, {"format": "avfoundation", "options": {"framerate": "30"}}
    if sys.platform == "win32":
        return f"video={name}", {"format": "dshow"}
    return f"/dev/video{name}" if name.isdigit() else name, {"format": "v4l2"}


def _upright(frame: VideoFrame) -> NDArray[np.uint8]:
    """The pixels of a frame in RGB, turned as its display matrix says (telephones film lying down)."""
    image: NDArray[Any] = frame.to_ndarray(format="rgb24")
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _reason(error: BaseException) -> str:
    """An FFmpeg error in words, without number and address."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).rstrip(".")
