"""Build what a config asks for; keys that nothing asks for are left alone."""

import inspect

import src.data  # noqa: F401
from src.archs.diffusion_model import DiffusionModel
from src.archs.flow_model import FlowModel
from src.registry.base import DATASET_REGISTRY, MODEL_REGISTRY

TASKS = {"flow": FlowModel, "diffusion": DiffusionModel}


def model_class(arch_name):
    return TASKS[MODEL_REGISTRY.get_metadata(arch_name)["task"]]


def known_arguments(cls, config):
    """Return the entries of `config` that are arguments of `cls`."""
    names = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in (config or {}).items() if name in names}


def create_datamodule(name, config):
    cls = DATASET_REGISTRY.get(name)
    return cls(**known_arguments(cls, config))
