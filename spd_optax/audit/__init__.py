"""The audit of a run: a log on disk, its verification, and its reports.

    python -m spd_optax.audit report RUN.jsonl

`format` describes the file. Only that command imports matplotlib and rich.
"""

from spd_optax.audit.advice import Advice, AuditWarning, advise
from spd_optax.audit.format import AuditFileError, Record, Run, read, verify
from spd_optax.audit.log import AuditLog

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
