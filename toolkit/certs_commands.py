"""The subcommands of `headrace certs`, and what `headrace up --mtls` makes."""

from pathlib import Path
from typing import Annotated

import typer

from services.common.config import SERVICES
from toolkit.command_line import fail
from toolkit.run_directory import RunDirectory

TOOLKIT = "headrace"
"""Whose name commands show to the services of a running stack."""

certs_app = typer.Typer(help="Certificates of a private CA, for TLS.", no_args_is_help=True)


@certs_app.command()
def create(
    folder: Annotated[Path, typer.Argument(help="Where the CA is, or is made, and the certificates go.")],
    name: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: one for each service.")] = None,
    san: Annotated[
        list[str] | None,
        typer.Option(
            help="DNS name or IP address that callers use beside the name. May be repeated. Default: as before."
        ),
    ] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the certificates are good.")] = 365,
) -> None:
    """Makes certificates and their keys, signed by the private CA in the folder, which is made if there is none."""
    # Every other command would wait for this import, too.
    from toolkit.certificates import BadFolder, BadName, make_certificates

    names = name or list(SERVICES)
    if any(Path(each).name != each or each in ("", "ca") for each in names):
        raise typer.BadParameter("A name is that of its files, and not `ca`.", param_hint="--name")
    try:
        make_certificates(folder, names, san or [], days=days)
    except (BadFolder, BadName, OSError, ValueError) as error:
        fail(str(error))
    for each in names:
        typer.echo(folder / f"{each}.crt")
    typer.echo(f"Signed by {folder / 'ca.crt'}. Keep ca.key where no service runs: who has it can join the services.")


def certificates_of_run(directory: RunDirectory) -> Path:
    """A folder of the run with a certificate for each service and for commands. Nobody can sign more: the CA's key is
    deleted.
    """
    from toolkit.certificates import make_certificates

    folder = directory.data_path("tls")
    make_certificates(folder, (*SERVICES, TOOLKIT))
    (folder / "ca.key").unlink()
    return folder
