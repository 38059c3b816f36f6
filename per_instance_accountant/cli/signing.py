"""``pia sign``: an Ed25519 signature beside a certificate."""

from __future__ import annotations

from typing import Annotated

import typer

from per_instance_accountant.cli.printing import Format, Page, Table, emit


def sign(
    certificate: Annotated[str, typer.Argument(help="Certificate file.", show_default=False)],
    key: Annotated[str, typer.Option("--key", help="PEM file of an Ed25519 key.", show_default=False)],
    output: Annotated[
        str | None, typer.Option("--output", help="File of the signature; default: CERTIFICATE.dsse.")
    ] = None,
    output_format: Annotated[
        Format, typer.Option("--format", help="How the result is written.")
    ] = Format.TABLE,
) -> None:
    """Sign a certificate (needs the extra sign). Checks nothing else: verify it first."""
    from per_instance_accountant.unlearning import Certificate, save_envelope
    from per_instance_accountant.unlearning import sign as make_envelope

    envelope = make_envelope(Certificate.load(certificate), key)
    path = output or f"{certificate}.dsse"
    save_envelope(envelope, path)
    document = {"signature": path, "keyid": envelope["signatures"][0]["keyid"]}
    emit(Page(head=[], tables=[Table.of([document])], document=document), output_format)
