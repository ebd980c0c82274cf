"""Conversations: templates, messages, thinking, replies, and questions about a document."""

from qwen3next.chat.session import Conversation
from qwen3next.chat.template import ChatTemplate
from qwen3next.generation.generation_config import GenerationConfig

__all__ = ["ChatTemplate", "Conversation", "GenerationConfig"]
