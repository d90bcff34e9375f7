"""The name that notebooks use: `import writer; writer.load(path).generate([...])`."""

from sampling.notebook import Writer, load

__all__ = ["Writer", "load"]
