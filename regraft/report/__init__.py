"""What a compilation did, as data: text, JSON and one HTML page. Importing this package does not import torch."""

from regraft.report.model import Environment, Event, OperatorRow, PassDrift, Report, ReportError

__all__ = ["Environment", "Event", "OperatorRow", "PassDrift", "Report", "ReportError"]
