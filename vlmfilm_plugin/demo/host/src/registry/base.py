"""Name -> object tables: networks, models (with their task) and datasets."""


class Registry:
    """A table that is filled by decorators."""

    def __init__(self, kind):
        self.kind = kind
        self._table = {}

    def register(self, name, metadata=None):
        def add(obj):
            self._table[name] = (obj, dict(metadata or {}))
            return obj

        return add

    def _row(self, name):
        if name not in self._table:
            raise KeyError(f"unknown {self.kind} {name!r}; known: {', '.join(sorted(self._table))}")
        return self._table[name]

    def get(self, name):
        return self._row(name)[0]

    def get_metadata(self, name):
        return self._row(name)[1]

    def keys(self):
        return self._table.keys()

    def __contains__(self, name):
        return name in self._table

    def __iter__(self):
        return iter(self._table)

    def __len__(self):
        return len(self._table)


ARCHS_REGISTRY = Registry("architecture")
MODEL_REGISTRY = Registry("model")
DATASET_REGISTRY = Registry("dataset")
