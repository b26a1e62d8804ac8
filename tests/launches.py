"""What Triton's launchers launch."""

__all__ = ["note_launches"]


def note_launches(monkeypatch, *modules) -> list[tuple]:
    """-> the (kernel, grid) of every launch of kernels of these modules, from now on."""
    seen = []

    class Noted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            seen.append((self.name, grid))
            return self.kernel[grid]

    for module in modules:
        for name, kernel in vars(module).copy().items():
            if "_kernel" in name:
                monkeypatch.setattr(module, name, Noted(name, kernel))
    return seen
