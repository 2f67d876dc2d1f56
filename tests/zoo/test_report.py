"""``report``: the files that it writes, and what a browser makes of the page."""

import base64
import os
import re
import shutil
import subprocess
import sys
import uuid
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from short_runs import files_of, train

from sb3_ppo_plus import zoo
from sb3_ppo_plus.zoo import report_page
from sb3_ppo_plus.zoo.found_runs import find_runs

STEPS = np.arange(1000, 11_000, 1000)
CONFIG = "learning_rate: lin_1e-3\nn_envs: 4\ngamma: 0.99\nbatch_size: 64\npolicy: MlpPolicy\nn_timesteps: 1e5\n"


def write_run(folder, algo, env, number, scores, config=CONFIG, seed=None):
    """A run as the RL Zoo leaves it: evaluations of two episodes each."""
    run = folder / algo / f"{env.replace('/', '-')}_{number}"
    (run / run.name.rpartition("_")[0]).mkdir(parents=True)
    episodes = np.stack([np.asarray(scores) - 1, np.asarray(scores) + 1], axis=1)
    np.savez(run / "evaluations.npz", timesteps=STEPS, results=episodes, ep_lengths=episodes.astype(int))
    parameters = run / run.name.rpartition("_")[0]
    (parameters / "config.yml").write_text(config)
    (parameters / "args.yml").write_text(f"env: {env}\nseed: {number if seed is None else seed}\n")
    return run


@pytest.fixture
def logs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(1, 6):
        write_run(Path("logs"), "ppo_plus", "CartPole-v1", number, 10 * number + STEPS / 100)
        write_run(Path("logs"), "ppo", "CartPole-v1", number, number + STEPS / 200, "gamma: 0.9\n")
    write_run(Path("logs"), "ppo_plus", "ALE/Pong-v5", 1, STEPS / 1000)
    return Path("logs")


class Page(HTMLParser):
    """What a page holds: texts, addresses, images, tables."""

    def __init__(self, path="logs/report/report.html"):
        super().__init__()
        self.in_cell = False
        self.texts, self.addresses, self.images, self.rows, self.tags = [], [], [], [], []
        self.feed(Path(path).read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "action"):
                self.addresses.append(value)
                if value.startswith("data:image/png;base64,"):
                    self.images.append(iio.imread(base64.b64decode(value.partition(",")[2]), extension=".png"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.texts.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def check_offline(page):
    """Nothing is asked of anybody, and nothing runs."""
    assert page.addresses and all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed", "form"} & set(page.tags)
    style = "".join(page.texts)
    assert "url(" not in style and "@import" not in style


def test_the_shell_reports_seeds_and_algorithms_in_one_page(logs):
    command = [sys.executable, "-m", "sb3_ppo_plus.zoo", "report", "logs"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "Report written to: logs/report/report.html" in output
    assert sorted(path.name for path in Path("logs/report").iterdir()) == [
        "ALE-Pong-v5.png",
        "CartPole-v1.png",
        "report.html",
    ]
    page = Page()
    check_offline(page)
    assert "11 runs of 2 algorithms in 2 environments" in page.text
    scores = [row for row in page.rows if len(row) == 5 and row[0] != "Algorithm"]
    assert [row[0] for row in scores] == ["ppo_plus", "ppo_plus", "ppo"]
    pong, plus, ppo = scores
    assert pong[1:] == ["10", "none (n=1)", "1", "10,000"]
    # Means of 10, 20, ..., 50 and 100; of 1, 2, ..., 5 and 50
    assert (plus[1], plus[3], plus[4]) == ("130", "5", "10,000") and ppo[1] == "53"
    low, high = map(float, plus[2].split(" to "))
    assert 110 < low < 130 < high < 150
    assert "Band: 95% stratified bootstrap interval over seeds (2000 resamples)" in page.text
    assert "One seed (n=1) has no interval" in page.text


def test_the_figures_are_drawn_for_light_and_for_dark_pages(logs):
    zoo.main(["report", "logs", "-e", "CartPole-v1"])
    dark, light = Page().images
    assert light.shape == dark.shape and light.shape[1] > 900
    assert light[..., :3].mean() > 220 and dark[..., :3].mean() < 80
    assert (iio.imread("logs/report/CartPole-v1.png") == light).all()
    # Both lines and both bands
    blue, orange = ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00])
    for color in (blue, orange):
        assert (light[..., :3] == color).all(axis=-1).sum() > 500


def test_the_same_runs_give_the_same_files(logs):
    zoo.main(["report", "logs", "-o", "first"])
    zoo.main(["report", "logs", "-o", "second"])
    assert files_of(Path("first")) == files_of(Path("second"))


def test_hyperparameters_that_differ_from_the_defaults_are_listed(logs):
    write_run(logs, "ppo_plus", "CartPole-v1", 6, STEPS, CONFIG.replace("lin_1e-3", "3e-4") + "memory: lstm\n")
    zoo.main(["report", "logs", "-e", "CartPole-v1"])
    rows = {row[1]: row[2] for row in Page().rows if len(row) == 3 and row[0] == "CartPole-v1"}
    expected = "learning_rate=lin_1e-3 or default memory=default or lstm n_envs=4 policy=MlpPolicy"
    assert rows["ppo_plus"] == expected
    assert rows["ppo"] == "gamma=0.9"


def test_versions_are_those_of_this_machine_and_of_the_models(tmp_path, monkeypatch):
    import torch as th

    run = train(tmp_path, "CartPole-v1")
    monkeypatch.chdir(tmp_path)
    zoo.main(["report", "logs"])
    assert f"PyTorch {th.__version__}" in report_page.trained_with(find_runs(run)[0])
    text = Page().text
    # A package's version may lack what PyTorch adds to its own, such as "+cu130"
    assert f"torch {version('torch')}" in text and f"PyTorch {th.__version__}" in text
    assert "Final score: mean over seeds at the last common step; mean of the episodes of an evaluation" in text
    seed = re.search(r"seed\n  - - (\d+)|- - seed\n    - (\d+)", (run / "CartPole-v1/args.yml").read_text())
    assert seed[2] in text


def test_folders_without_episodes_do_not_count_against_evaluations(logs, capsys):
    for number in (7, 8, 9, 10, 11, 12):
        run = write_run(logs, "ppo_plus", "ALE/Pong-v5", number, STEPS)
        (run / "evaluations.npz").unlink()
        (run / "0.monitor.csv").write_text('#{"t_start": 0.0, "env_id": "ALE/Pong-v5"}\nr,l,t\n')
    zoo.main(["report", str(logs), "-e", "ALE/Pong-v5"])
    assert "evaluations.npz" in Page().text and "monitor.csv)" not in Page().text


def test_training_returns_are_shown_where_most_runs_have_no_evaluations(logs, capsys):
    run = write_run(logs, "ppo", "Pendulum-v1", 1, STEPS)
    for number in (2, 3):
        shutil.copytree(run, run.with_name(f"Pendulum-v1_{number}"))
        run.with_name(f"Pendulum-v1_{number}").joinpath("evaluations.npz").unlink()
        lines = ["#" + '{"t_start": 1.0}', "r,l,t", *(f"{-number},200,{index}" for index in range(150))]
        run.with_name(f"Pendulum-v1_{number}").joinpath("0.monitor.csv").write_text("\n".join(lines))
    zoo.main(["report", "logs", "-e", "Pendulum-v1"])
    text = Page().text
    assert "mean of the last 100 episodes of training (monitor.csv)" in text
    assert "Left out ppo/Pendulum-v1_1: ppo/Pendulum-v1_1: no results in monitor.csv" in text
    assert [row for row in Page().rows if len(row) == 5][1] == ["ppo", "-2.5", "-3 to -2", "2", "30,000"]
    # A report is handed on
    assert str(Path.cwd()) not in Page().text


def test_flags_choose_what_is_shown(logs, tmp_path):
    shutil.copytree(logs / "ppo", tmp_path / "other" / "ppo")
    zoo.main(
        ["report", "logs", "other", "-l", "a", "b", "-a", "ppo", "-max", "5000", "--statistic", "iqm", "-o", "out"]
    )
    rows = [row for row in Page("out/report.html").rows if len(row) == 5][1:]
    assert [row[0] for row in rows] == ["a-ppo", "b-ppo"]
    # The middle of 1, 2, ..., 5, and 25
    assert [row[1] for row in rows] == ["28", "28"] and rows[0][4] == "5,000"
    assert "interquartile mean" in Page("out/report.html").text
    zoo.main(["report", "logs", "-a", "ppo", "-median", "-k", "ep_lengths", "-o", "out"])
    assert "Line: median over n seeds" in Page("out/report.html").text
    with pytest.raises(SystemExit, match=r"ppo/CartPole-v1_1: ends at step 10000, before 20000"):
        zoo.main(["report", "logs", "-min", "20000"])
    with pytest.raises(SystemExit, match="--labels must be as many as folders"):
        zoo.main(["report", "logs", "-l", "a", "b"])


def test_a_run_that_is_named_twice_counts_once(logs):
    zoo.main(["report", "logs", "logs/ppo", "logs/ppo/CartPole-v1_1", "-a", "ppo"])
    assert Page().rows[1][3] == "5"


def test_what_a_folder_holds_is_no_html(logs, capsys):
    evil, algo = "<script>alert(1)</script>", "<img src=x onerror=alert(1)>"
    shutil.rmtree(logs)
    write_run(logs, algo, "CartPole-v1", 1, STEPS, f'gamma: "{evil}"\n"{evil}": 1\n', f'"{evil}"')
    (write_run(logs, algo, "CartPole-v1", 2, STEPS) / "evaluations.npz").write_bytes(b"none")
    write_run(logs, "$x_1$", "CartPole-v1", 2, STEPS)
    zoo.main(["report", "logs"])
    page = Page()
    check_offline(page)
    assert page.tags.count("img") == 1 and evil in page.text and "Left out" in page.text


def test_links_to_files_of_the_user_are_not_shown(logs):
    config = logs / "ppo_plus/CartPole-v1_1/CartPole-v1/config.yml"
    config.unlink()
    Path("private.yml").write_text("password: secret\n")
    config.symlink_to(Path("private.yml").absolute())
    zoo.main(["report", "logs"])
    assert "secret" not in Page().text


@pytest.mark.parametrize("name", ["evaluations.npz", "0.monitor.csv"])
def test_scores_behind_links_are_not_shown(name, logs):
    run = logs / "ppo_plus/CartPole-v1_1"
    private = Path("private").absolute()
    if name.endswith("npz"):
        os.replace(run / name, private)
    else:
        shutil.rmtree(logs)
        (run / "CartPole-v1").mkdir(parents=True)
        private.write_text('#{"t_start": 0.0}\nr,l,t\n98765.0,5,1.0\n')
    (run / name).symlink_to(private)
    with pytest.raises(SystemExit, match=r"1: .*ppo_plus/CartPole-v1_1/.* is a link") as caught:
        zoo.main(["report", str(run)])
    assert str(private) not in str(caught.value)


def test_runs_with_a_uuid_are_reported(logs):
    run = logs / "ppo_plus/CartPole-v1_1"
    run.rename(run.with_name(f"CartPole-v1_1_{uuid.uuid4()}"))
    found = [run for run in find_runs(logs) if run.suffix != str(run.exp_id)]
    assert [(run.env_id, run.exp_id, run.parameters.is_dir()) for run in found] == [("CartPole-v1", 1, True)]


def test_folders_without_scores_are_named(tmp_path, logs):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=r"nothing to report in empty:\nno run with evaluations\.npz or monitor\.csv"):
        zoo.main(["report", "empty"])
    with pytest.raises(SystemExit, match="nowhere is no folder"):
        zoo.main(["report", "nowhere"])


def browser():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


PROBE = """<script>addEventListener("load", () => {
const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
const images = [...document.images].map(i => [i.complete, i.naturalWidth, i.currentSrc.length])
document.body.dataset.seen = JSON.stringify({width: innerWidth, scroll: document.documentElement.scrollWidth,
wide: wide.map(e => e.tagName), images, paper: getComputedStyle(document.body).backgroundColor})})</script>"""


def in_browser(folder, width, *flags):
    """Open the page, and return what a script that is added sees there."""
    import html
    import json

    page = Path("logs/report/report.html").read_text(encoding="utf-8")
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page).replace("</body>", f"{PROBE}</body>")
    path = folder / f"probed-{width}.html"
    path.write_text(probed, encoding="utf-8")
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-component-update", "--disable-sync", f"--user-data-dir={folder / f'profile-{width}'}"]
    command += [f"--window-size={width},900", *flags, "--dump-dom", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    return json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom)[1]))


@pytest.mark.heavy
def test_a_browser_shows_the_page_on_desks_and_phones_in_light_and_dark(logs, tmp_path):
    write_run(logs, "ppo_plus", f"{'Long' * 12}Name-v1", 1, STEPS, CONFIG + f"policy_kwargs: {'x' * 150}\n")
    zoo.main(["report", "logs"])
    page = Page()
    check_offline(page)
    assert all(image.shape[1] > 900 for image in page.images)
    if browser() is None:
        # The page was read above, and no browser is there to show it
        return
    desk = in_browser(tmp_path, 1280)
    phone = in_browser(tmp_path, 390, "--blink-settings=preferredColorScheme=0")
    for seen in (desk, phone):
        assert seen["wide"] == [] and seen["scroll"] <= seen["width"]
        assert len(seen["images"]) == 3 and all(complete and width > 900 for complete, width, _ in seen["images"])
    assert phone["width"] < 600 < desk["width"]
    assert desk["paper"] == "rgb(246, 247, 249)" and phone["paper"] == "rgb(18, 20, 23)"
    assert [seen[2] for seen in desk["images"]] != [seen[2] for seen in phone["images"]]
