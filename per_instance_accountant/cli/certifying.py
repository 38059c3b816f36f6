"""``pia verify`` and ``pia sign``: what a certificate is worth."""

from __future__ import annotations

from typing import Annotated

import typer

from per_instance_accountant.cli.application import FormatOption, finish
from per_instance_accountant.cli.pages import verification_page
from per_instance_accountant.cli.printing import Format, Page, Table, emit


def verify(
    certificate: Annotated[str, typer.Argument(help="Certificate file.", show_default=False)],
    ledger: Annotated[
        str | None, typer.Option("--ledger", help="Without it the claim is not established.")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", help="Model file after unlearning.")
    ] = None,
    signature: Annotated[str | None, typer.Option("--signature", help="File that pia sign wrote.")] = None,
    public_key: Annotated[str | None, typer.Option("--public-key", help="PEM file of the signer.")] = None,
    require_signature: Annotated[
        bool, typer.Option("--require-signature", help="Without a signature it is not valid.")
    ] = False,
    plan_file: Annotated[str | None, typer.Option("--plan", help="It must be of this plan.")] = None,
    request_id: Annotated[
        str | None, typer.Option("--request-id", help="It must be of this request.")
    ] = None,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Recompute a certificate's claim from the evidence."""
    from per_instance_accountant.unlearning import verify as recompute

    report = recompute(
        certificate,
        ledger=ledger,
        checkpoint=checkpoint,
        signature=signature,
        public_key=public_key,
        require_signature=require_signature,
        plan=plan_file,
        request_id=request_id,
    )
    emit(verification_page(report), output_format)
    finish(report.valid)


def sign(
    certificate: Annotated[str, typer.Argument(help="Certificate file.", show_default=False)],
    key: Annotated[str, typer.Option("--key", help="PEM file of an Ed25519 key.", show_default=False)],
    output: Annotated[
        str | None, typer.Option("--output", help="File of the signature; default: CERTIFICATE.dsse.")
    ] = None,
    output_format: FormatOption = Format.TABLE,
) -> None:
    """Sign a certificate (needs the extra sign). Checks nothing else: verify it first."""
    from per_instance_accountant.unlearning import Certificate, save_envelope
    from per_instance_accountant.unlearning import sign as make_envelope

    envelope = make_envelope(Certificate.load(certificate), key)
    path = output or f"{certificate}.dsse"
    save_envelope(envelope, path)
    document = {"signature": path, "keyid": envelope["signatures"][0]["keyid"]}
    emit(Page(head=[], tables=[Table.of([document])], document=document), output_format)


COMMANDS = (verify, sign)
