"""Ray Tune as far as a sweep calls it, in this process: trials run one after another, each once."""

from types import SimpleNamespace


class FakeTune:
    """What `require("ray.tune")` returns. After `stop_after` trials `fit` returns early, as Ray Tune's does at Ctrl-C."""

    Trainable = Callback = object
    PlacementGroupFactory = staticmethod(lambda bundles, **_: bundles)
    with_resources = staticmethod(lambda kind, _: kind)
    grid_search = staticmethod(list)
    RunConfig = FailureConfig = TuneConfig = staticmethod(lambda **options: SimpleNamespace(**options))

    def __init__(self, stop_after=None, nodes=({"CPU": 8},)):
        self.stop_after, self.nodes, self.ran, self.resources = stop_after, nodes, [], {}

    def install(self, monkeypatch):
        ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in self.nodes])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # cells without a GPU change it
        monkeypatch.setattr("tuner.cluster.connection.connect", lambda address: lambda: None)
        monkeypatch.setattr("tuner.cluster.connection.require", lambda name="ray": self if name == "ray.tune" else ray)
        return self

    def Tuner(self, trainable, *, param_space, run_config, tune_config):
        return SimpleNamespace(fit=lambda: self._fit(trainable, param_space["cell"], run_config))

    def _fit(self, trainable, cells, run_config):
        results = []
        for cell in cells[: self.stop_after]:
            self.ran.append(cell["name"])
            self.resources[cell["name"]] = cell["resources"]
            study = trainable()
            study.config, error = {"cell": cell}, None
            study.setup(study.config)
            event = {"iteration": 0, "trials": [], "trial": study}
            for callback in run_config.callbacks:
                callback.on_trial_start(**event)
            try:
                study.step()
            except RuntimeError as raised:
                error = raised
            for callback in run_config.callbacks:
                (callback.on_trial_error if error else callback.on_trial_complete)(**event)
            results.append(SimpleNamespace(config=study.config, error=error))
        return results
