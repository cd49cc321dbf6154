"""Leaves out what this machine cannot run, which is then no case rather than one that is skipped."""

from services.worker.engine.kernels.compiled.isa import choose_isa

collect_ignore = [] if choose_isa().matrices else ["test_matrix_linear.py"]
