"""A run is also logged to trackers that are switched on, in one run there however often resumed.

Weights & Biases and MLflow are not installed here: modules with the functions that are called
stand in for them.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from mics_fast.common.errors import InputError
from mics_fast.engine.log import RunLog, read_log

OPTIONS = {f"option_{number}": number for number in range(150)}


class FakeWandb(ModuleType):
    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished, self.axes = [], [], 0, {}

    def init(self, **settings):
        self.begun.append(settings)
        return SimpleNamespace(
            id=settings["id"] or "abc",
            log=self.logged.append,
            finish=self.finish,
            define_metric=lambda name, step_metric: self.axes.update({name: step_metric}),
        )

    def finish(self):
        self.finished += 1


class FakeMlflow(ModuleType):
    def __init__(self):
        super().__init__("mlflow")
        self.begun, self.logged, self.parameters, self.ended = [], [], {}, 0

    def set_experiment(self, name):
        self.experiment = name

    def start_run(self, run_id=None, run_name=None):
        self.begun.append((run_id, run_name))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "f00"))

    def log_params(self, values):
        assert len(values) <= 100  # the limit of MLflow's server
        self.parameters |= values

    def log_metrics(self, values, step):
        self.logged.append((step, values))

    def end_run(self):
        self.ended += 1


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def mlflow(monkeypatch):
    fake = FakeMlflow()
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    return fake


def log_once(folder, tracker, step):
    log = RunLog(folder, options=OPTIONS, trackers=[tracker])
    log.write("finetune", step, {"loss": 0.5}, "")
    log.close()


def test_wandb_gets_options_and_records_under_the_steps_of_their_stage(wandb, tmp_path):
    log_once(tmp_path, "wandb", 7)
    (settings,) = wandb.begun
    assert settings["config"] == OPTIONS and settings["name"] == tmp_path.name
    assert wandb.logged == [{"finetune/step": 7, "finetune/loss": 0.5}]
    assert wandb.axes["finetune/*"] == "finetune/step" and wandb.finished == 1


def test_mlflow_gets_options_and_records(mlflow, tmp_path):
    log_once(tmp_path, "mlflow", 7)
    assert mlflow.parameters == OPTIONS
    assert mlflow.logged == [(7, {"finetune/loss": 0.5})] and mlflow.ended == 1


def test_a_resumed_run_goes_on_in_the_same_one(wandb, mlflow, tmp_path):
    for step in (1, 2):
        log_once(tmp_path, "wandb", step)
        log_once(tmp_path, "mlflow", step)
    assert [settings["id"] for settings in wandb.begun] == [None, "abc"]
    assert mlflow.begun == [(None, tmp_path.name), ("f00", None)]


def test_a_tracker_that_fails_is_reported_once_and_costs_nothing_else(wandb, tmp_path, capsys):
    def fail(_):
        raise ConnectionError("the server is gone")

    wandb.logged = SimpleNamespace(append=fail)
    log = RunLog(tmp_path, options=OPTIONS, trackers=["wandb"])
    for step in (1, 2):
        log.write("finetune", step, {"loss": 0.5}, "")
    log.close()
    told = capsys.readouterr().err
    assert told.count("wandb cannot be written to: the server is gone; going on without it") == 1
    assert [record["step"] for record in read_log(tmp_path)["finetune"]] == [1, 2]


def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"option log\.wandb is true, but wandb is not installed"):
        RunLog(tmp_path, trackers=["wandb"])


def test_a_tracker_that_cannot_begin_is_one_sentence(wandb, tmp_path):
    def fail(**_):
        raise RuntimeError("no login\nfound")

    wandb.init = fail
    with pytest.raises(InputError, match=r"option log\.wandb: a run cannot begin: no login found"):
        RunLog(tmp_path, trackers=["wandb"])
