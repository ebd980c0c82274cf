"""The interactive loop of `qwen3next chat`."""

import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress

from qwen3next.chat import Conversation
from qwen3next.chat.thinking import Piece
from qwen3next.commands.interrupt import patient_ctrl_c
from qwen3next.commands.screen import Screen, note

HELP = '''/reset         remove all messages except the system prompt
/undo          remove the last message and its reply
/system TEXT   replace the system prompt; without TEXT, remove it
/save FILE     write the conversation as JSON
/load FILE     continue the conversation of a file
/exit          exit, like Ctrl-D
Everything else is a message. Put a message of several lines between """ and """. Ctrl-C stops a reply.'''


class Session:
    """Reads messages and commands from stdin and prints replies.

    On a terminal, an error is printed and the conversation continues; otherwise the first error is raised.

    Args:
        reply: replies to a message, with the options of the command line.
    """

    def __init__(
        self,
        conversation: Conversation,
        *,
        reply: Callable[[str], Generator[Piece, None, None]],
        show_thinking: bool,
        interactive: bool,
        quiet: bool,
    ):
        self.conversation, self.interactive = conversation, interactive
        self._reply, self._show_thinking, self._quiet = reply, show_thinking, quiet
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: note(HELP),
            "/reset": lambda _: conversation.reset(),
            "/undo": lambda _: conversation.undo(),
            "/system": conversation.set_system,
            "/save": lambda file: conversation.save(_named(file, "/save")),
            "/load": lambda file: conversation.load(_named(file, "/load")),
        }

    def run(self) -> None:
        """Run until /exit or the end of input."""
        if self.interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  adds arrow keys and a history to input()
            self._say("/help lists commands, Ctrl-C stops a reply, Ctrl-D exits.")
        interrupted = False
        while True:
            try:
                if interrupted:
                    interrupted = False
                    print(file=sys.stderr)  # end the interrupted line
                line = self._read(">>> ")
                if line.rstrip() == "/exit":
                    return
                self._obey(line)
            except EOFError:
                if self.interactive:
                    print(file=sys.stderr)  # end the prompt's line
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                interrupted = True  # do nothing else here: another Ctrl-C would end the session
            except BrokenPipeError:
                raise
            except (ValueError, RuntimeError, OSError) as error:
                if not self.interactive:
                    raise
                print((str(error) or repr(error)).splitlines()[0], file=sys.stderr)

    def ask(self, text: str) -> None:
        """Print the reply to one message. On a terminal, Ctrl-C stops the reply and keeps the text so far."""
        screen, before = Screen(show_thinking=self._show_thinking), self.conversation.messages
        reply = self._reply(text)
        try:
            with closing(reply), patient_ctrl_c(self._speaks) as stop:
                for kind, piece in reply:
                    screen.write(kind, piece)
                    if stop:
                        break
        except KeyboardInterrupt:
            if not self.interactive:
                raise
        finally:
            screen.end()
        self._report(kept=self.conversation.messages is not before)

    def _speaks(self) -> bool:
        stats = self.conversation.stats
        return self.interactive and stats is not None and stats.new > 0

    def _obey(self, line: str) -> None:
        if line.startswith("/"):
            name, _, rest = line.partition(" ")
            if name not in self._commands:
                raise ValueError(f"There is no command {name}: type /help for a list, or start a message with a space.")
            self._commands[name](rest.strip())
            if name != "/help":
                self._say(f"Messages in the conversation: {len(self.conversation.messages)}")
            return
        if line.startswith('"""'):
            line = self._several_lines(line.removeprefix('"""'))
        if line.strip():
            self.ask(line)

    def _several_lines(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith('"""'):
            try:
                lines.append(self._read("... "))
            except EOFError:
                raise ValueError('The message that starts with """ has no end: end it with """.') from None
        return "\n".join(lines).rstrip().removesuffix('"""').strip("\n")

    def _read(self, prompt: str) -> str:
        if self.interactive and sys.stdout.isatty():
            return input(prompt)
        if self.interactive:  # stdout is a file: print the prompt to stderr
            print(prompt, end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            raise ValueError("stdin is not UTF-8 text.") from None
        if not line:
            raise EOFError
        return line.removesuffix("\n")

    def _report(self, *, kept: bool) -> None:
        stats = self.conversation.stats
        assert stats is not None
        if not kept:
            self._say("Stopped before the first word: the message was not added.")
            return
        # The prompt's forward makes the first token; the rate counts the steps after it.
        steps, seconds = stats.new - 1, stats.seconds - stats.prompt_seconds
        rate = f", {steps / seconds:.1f} tok/s" if steps > 0 and seconds > 0 else ""
        why = {"stop": "", "length": ", cut at the limit", "interrupted": ", stopped"}[stats.ended]
        prompt = f"{stats.prompt} prompt tokens, {stats.reused} of them in the cache, in {stats.prompt_seconds:.2f} s"
        self._say(f"{prompt}; {stats.new} new{rate}{why}")

    def _say(self, text: str) -> None:
        if not self._quiet:
            note(text)


def _named(file: str, command: str) -> str:
    if not file:
        raise ValueError(f"{command} needs a file name: add it after the command.")
    return file
