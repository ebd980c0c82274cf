"""Chat: templates, messages, thinking, replies, and questions about a document."""

from qwen3next.chat.session.session import Conversation

__all__ = ["Conversation"]
