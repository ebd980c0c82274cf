"""What happens between two prompts of `qwen3next chat`."""

import sys
from collections.abc import Callable, Generator
from contextlib import closing, suppress

from qwen3next.chat.session import Conversation
from qwen3next.chat.thinking import Piece
from qwen3next.commands.interrupt import patient_ctrl_c
from qwen3next.commands.screen import Screen, note

HELP = '''/reset         forget the conversation, but not the system prompt
/undo          take back the last message and its reply
/system TEXT   another system prompt; without TEXT, none
/save FILE     write the conversation as JSON
/load FILE     continue the conversation of a file
/exit          leave; so does Ctrl-D
Everything else is a message. One of several lines stands between """ and """; Ctrl-C stops a reply.'''


class Session:
    """Reads messages and commands from stdin, prints replies.

    On a terminal an error is a sentence and the conversation goes on; in a script the first one ends it.

    Args:
        reply: answers a message, with the options of the command line.
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
        """Until /exit or the end of input."""
        if self.interactive:
            with suppress(ImportError):
                import readline  # noqa: F401  gives input() arrow keys and a history
            self._say("/help lists commands, Ctrl-C stops a reply, Ctrl-D leaves.")
        interrupted = False
        while True:
            try:
                if interrupted:
                    interrupted = False
                    print(file=sys.stderr)  # the line that was begun is forgotten
                line = self._read(">>> ")
                if line.rstrip() == "/exit":
                    return
                self._obey(line)
            except EOFError:
                if self.interactive:
                    print(file=sys.stderr)  # the prompt's line is still open
                return
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                interrupted = True  # and no more is done here, where another Ctrl-C would end the session
            except BrokenPipeError:
                raise
            except (ValueError, RuntimeError, OSError) as error:
                if not self.interactive:
                    raise
                print((str(error) or repr(error)).splitlines()[0], file=sys.stderr)

    def ask(self, text: str) -> None:
        """Print the reply to one message. Ctrl-C on a terminal stops it, and what was said is kept."""
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
                raise ValueError(f"There is no command {name}: /help lists them; a message may begin with a space.")
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
                raise ValueError('The message that """ begins was not ended by another """.') from None
        return "\n".join(lines).rstrip().removesuffix('"""').strip("\n")

    def _read(self, prompt: str) -> str:
        if self.interactive and sys.stdout.isatty():
            return input(prompt)
        if self.interactive:  # stdout goes to a file, where a prompt has no place
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
            self._say("Stopped before the first word: the message is not kept.")
            return
        # The first token belongs to the prompt's forward; the speed is that of the steps after it.
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
        raise ValueError(f"{command} needs the name of a file.")
    return file
