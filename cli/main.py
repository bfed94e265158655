"""The command line: a group that imports a command only when it is called, and turns errors into one sentence."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version

import click

COMMANDS = ("compress", "export", "eval", "pick", "profile", "tables", "report", "compare", "targets", "zoo", "doctor")


class LazyGroup(click.Group):
    """Commands live in one module each, named after them; none of these imports torch before it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module = import_module(f"edgecompress.cli.{'evaluate' if name == 'eval' else name}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from edgecompress.errors import UnknownNameError

            raise UnknownNameError("command", args[0], COMMANDS)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(version("edgecompress"), prog_name="edgecompress")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context, debug: bool) -> None:
    """Compress a trained network for one device: prune channels, choose bits, export, prove.

    \b
    Example:
      edgecompress compress --target jetson
      edgecompress export runs/resnet8-digits-jetson-orin-nano --format onnx
      edgecompress doctor

    \b
    Exit codes:
      0    done
      1    an error, told in one sentence (--debug shows where it came from)
      2    the call is wrong: an option, a file, the model, the data
      3    the run is complete, but missed a budget, an accuracy drop or a proof
      4    a runtime or a device that is needed is not there
      130  interrupted; what was finished is kept
    """
    ctx.obj = {"debug": debug}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the ``edgecompress`` command."""
    from edgecompress.errors import EdgeCompressError

    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        # A command's Exit comes back as a number here.
        code = cli.main([a for a in arguments if a != "--debug"], prog_name="edgecompress", standalone_mode=False)
        if isinstance(code, int) and code:
            sys.exit(code)
    except EdgeCompressError as error:
        _fail(str(error), error.exit_code, debug)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        _fail("Interrupted. What was finished is kept; go on with --resume.", 130, debug)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        _fail(f"Something that was not foreseen went wrong ({text}). Run again with --debug and report it.", 1, debug)


def _fail(sentence: str, code: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    click.echo(f"Error: {sentence}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
