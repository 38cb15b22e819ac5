"""JupyterLab as `moe-lab lab` starts it: `python -m moe_lab.course.server OPTIONS`, the token in JUPYTER_TOKEN."""

import os
import signal
import sys

from jupyterlab.labapp import main

if __name__ == "__main__":
    # Every user of a machine can read a command line, so the token comes through the environment; as an option it
    # counts even where the learner's own Jupyter settings switch tokens off. Kernels do not inherit it.
    sys.argv.append("--IdentityProvider.token=" + os.environ.pop("JUPYTER_TOKEN"))
    # Without a terminal, and on Windows, Jupyter leaves Ctrl-C to chance; for SIGTERM it always stops in good order.
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
    sys.exit(main())
