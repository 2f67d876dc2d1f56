"""``record``: a video of a run's model, or of all models that training has saved."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.vec_env import VecEnv, VecVideoRecorder

from sb3_ppo_plus.zoo.hyperparams import import_optional
from sb3_ppo_plus.zoo.parser import ZooParser
from sb3_ppo_plus.zoo.run_folder import (
    Run,
    act,
    add_run_arguments,
    create_env,
    environment_name,
    find_run,
    hint_at_trust,
    is_deterministic,
    load_model,
    prepare,
)

#: Frames of a GIF in a second, as in the RL Zoo
GIF_FPS = 10
_CHECKPOINT = re.compile(r"rl_model_(\d+)_steps\.zip", re.ASCII)


def main(arguments: list[str]) -> None:
    """Run ``record``; its flags are those of ``rl_zoo3.record_video`` and ``rl_zoo3.record_training``.

    :param arguments: what the user gave after the command
    :raises SystemExit: if there is no model, if it is refused without trust, or if the environment renders no images
    """
    parser = ZooParser(
        prog="python -m sb3_ppo_plus.zoo record",
        description="Record a video (mp4) of a run's last model, of its best one, or of a checkpoint.",
    )
    add_run_arguments(parser)
    parser.add_argument("-n", "--n-timesteps", help="number of steps to record", default=1000, type=int)
    parser.add_argument("-o", "--output-folder", help="folder of the videos; by default, videos in the run's folder")
    parser.add_argument("--no-render", action="store_true", help="as in the RL Zoo: no window. There is never one")
    parser.add_argument(
        "--training", action="store_true", help="one video per checkpoint, and all joined: training.mp4"
    )
    parser.add_argument("-g", "--gif", action="store_true", help="make a GIF too")
    args = parser.parse_args(arguments)
    if args.n_timesteps < 1:
        parser.error(f"--n-timesteps must be at least 1, got {args.n_timesteps}")
    if args.training and (args.load_best or args.load_checkpoint is not None or args.load_last_checkpoint):
        parser.error("--training records all models of the run: give it no --load-best and no --load-checkpoint")
    prepare(args)
    with hint_at_trust("record"):
        if args.training:
            path = record_training(args)
        else:
            run = find_run(args)
            path = record_run(run, args, _output_folder(run, args))
    print(f"Saved video to {path}")
    if args.gif:
        print(f"Saved GIF to {write_gif(path)}")


def _output_folder(run: Run, args: argparse.Namespace) -> Path:
    return Path(args.output_folder) if args.output_folder else run.folder / "videos"


def record_run(run: Run, args: argparse.Namespace, folder: Path) -> Path:
    """Record one model.

    :param run: the model
    :param args: of ``record``
    :param folder: where the video goes
    :return: the video
    :raises SystemExit: if the environment renders no images
    """
    env = create_env(run, args, render_mode="rgb_array")
    model = load_model(run, env, args)
    return record_video(model, env, folder, run.prefix, args.n_timesteps, is_deterministic(run, args))


def record_video(model: Any, env: VecEnv, folder: Path, prefix: str, n_steps: int, deterministic: bool) -> Path:  # noqa: ANN401  # of any algorithm
    """Record a model's steps from new episodes on. The first image is that of the beginning.

    :param model: the model
    :param env: its environments with ``render_mode="rgb_array"``, which are closed. Several are shown side by side
    :param folder: where the video goes
    :param prefix: beginning of the video's name
    :param n_steps: number of steps
    :param deterministic: whether to take the most likely actions
    :return: the video, an mp4 with ``n_steps + 1`` images; moviepy, which adds up times, may lose the last one
    :raises SystemExit: if the environment renders no images
    """
    modes = env.get_attr("metadata")[0].get("render_modes") or []
    if env.render_mode != "rgb_array" or "rgb_array" not in modes:
        raise SystemExit(f"The environment renders no images: its render_modes are {list(modes)}, not 'rgb_array'")
    recorder = VecVideoRecorder(env, str(folder), lambda step: step == 0, video_length=n_steps, name_prefix=prefix)
    try:
        act(model, recorder, n_steps, deterministic)
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("mujoco", "OpenGL"):
            raise
        raise SystemExit(f"MuJoCo cannot render ({error}): without a display, set MUJOCO_GL=egl, or osmesa") from error
    finally:
        recorder.close()
    path = Path(recorder.video_path)
    if not path.is_file():
        raise SystemExit("The environment rendered no images: render() did not return an array")
    return path


def record_training(args: argparse.Namespace) -> Path:
    """Record every checkpoint of a run, its last and its best model, and join the videos.

    :param args: of ``record``
    :return: ``training.mp4``
    :raises SystemExit: if the run has no model
    """
    videos: list[tuple[str, Path]] = []
    folder = None
    for label, which in _saved_models(args):
        run = find_run(argparse.Namespace(**{**vars(args), **which}))
        folder = folder or _output_folder(run, args)
        videos.append((label, record_run(run, args, folder)))
    assert folder is not None
    return join(videos, folder / "training.mp4")


def _saved_models(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """Return a label for each model of a run, and the flags that choose it."""
    utils, name = import_optional("rl_zoo3.utils"), import_optional("huggingface_sb3").EnvironmentName(args.env)
    exp_id = args.exp_id or utils.get_latest_run_id(os.path.join(args.folder, args.algo), name)
    folder = Path(args.folder) / args.algo / (f"{name}_{exp_id}" if exp_id > 0 else "")
    if not folder.is_dir():
        raise SystemExit(f"The {folder} folder was not found")
    matches = [_CHECKPOINT.fullmatch(path.name) for path in folder.iterdir()]
    steps = sorted(int(match.group(1)) for match in matches if match)
    models: list[tuple[str, dict[str, Any]]] = [(f"checkpoint {n}", {"load_checkpoint": n}) for n in steps]
    if (folder / f"{environment_name(args.env)}.zip").is_file():
        models.append(("final model", {}))
    if (folder / "best_model.zip").is_file():
        models.append(("best model", {"load_best": True}))
    if not models:
        raise SystemExit(f"{folder} has no model to record")
    return [(label, {"exp_id": exp_id, **which}) for label, which in models]


def join(videos: Sequence[tuple[str, Path]], path: Path) -> Path:
    """Join videos, each with its label written on its images.

    :param videos: labels and files, of images of one size
    :param path: the video to write
    :return: ``path``
    """
    # imageio gives each image once; moviepy's clips are functions of time, which round
    imageio = import_optional("imageio.v3")
    first = videos[0][1]
    height, width = imageio.improps(first, index=0).shape[:2]
    writers = import_optional("moviepy.video.io.ffmpeg_writer")
    with writers.FFMPEG_VideoWriter(str(path), (width, height), imageio.immeta(first)["fps"]) as writer:
        for label, video in videos:
            labelled = _labeller(label)
            for image in imageio.imiter(video):
                writer.write_frame(labelled(image))
    return path


def _labeller(label: str) -> Any:  # noqa: ANN401  # a function from image to image
    image_module, draw_module, font_module = (
        import_optional(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont")
    )

    def labelled(image: np.ndarray) -> np.ndarray:
        picture = image_module.fromarray(image)
        draw = draw_module.Draw(picture, "RGBA")
        font = font_module.load_default(size=max(12, image.shape[0] // 18))
        centre = (image.shape[1] / 2, image.shape[0] / 25)
        box = draw.textbbox(centre, label, font=font, anchor="mt")
        draw.rectangle((box[0] - 5, box[1] - 5, box[2] + 5, box[3] + 5), fill=(0, 0, 0, 128))
        draw.text(centre, label, font=font, anchor="mt", fill="white")
        return np.asarray(picture)

    return labelled


def write_gif(video: Path) -> Path:
    """Make a GIF of a video, beside it.

    :param video: the video
    :return: the GIF
    """
    path = video.with_suffix(".gif")
    with import_optional("moviepy").VideoFileClip(str(video)) as clip:
        clip.write_gif(str(path), fps=GIF_FPS, logger=None)
    return path
