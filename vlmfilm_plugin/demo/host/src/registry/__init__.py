from src.registry.base import ARCHS_REGISTRY, DATASET_REGISTRY, MODEL_REGISTRY, Registry

__all__ = ["ARCHS_REGISTRY", "DATASET_REGISTRY", "MODEL_REGISTRY", "Registry"]
