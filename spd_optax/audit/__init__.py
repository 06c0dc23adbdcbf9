"""The audit of a run: a log on disk, its verification, and reports of it.

    python -m spd_optax.audit report RUN.jsonl

`reading` describes the format of the file. Neither matplotlib nor rich is imported but by
that command.
"""

from spd_optax.audit.advice import Advice, AuditWarning, advise
from spd_optax.audit.lines import AuditFileError
from spd_optax.audit.log import AuditLog
from spd_optax.audit.reading import Record, Run, read, verify

__all__ = [
  'Advice',
  'AuditFileError',
  'AuditLog',
  'AuditWarning',
  'Record',
  'Run',
  'advise',
  'read',
  'verify',
]
