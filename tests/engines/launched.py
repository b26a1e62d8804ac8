"""The command line with CPUs that pass for accelerators, since accelerate shards a model over these alone."""

import os

from accelerate.state import PartialState
from accelerate.utils import DistributedType

from diffmas.cli.main import app

if __name__ == "__main__":
    begin = PartialState.__init__

    def pretending(self, *args, **options):
        begin(self, *args, **options)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = pretending
    app()
