"""Read once, ask many times: sessions, their files, and decoding at constant cost."""

from infini_attention.models.decoder import Decoder
from infini_attention.streaming.pool import SessionPool
from infini_attention.streaming.session import Session, SessionInfo

__all__ = ["Decoder", "Session", "SessionInfo", "SessionPool"]
