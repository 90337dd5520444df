"""Records of runs, the cards of their models, and the page that compares them."""

from .card import PREFERENCE, write_card
from .record import identify

__all__ = ["PREFERENCE", "identify", "write_card"]
