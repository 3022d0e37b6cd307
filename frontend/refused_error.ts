import { Vhost2Error } from "../ffi/errors.ts";

/** The back-end refused a request: a non-zero ack, or an empty reply. */
export class RefusedError extends Vhost2Error {
  override readonly name: string = "RefusedError";
  /** The specification's name without VHOST_USER_. */
  readonly request: string;
  /** The u64 of the ack; undefined where the reply was empty. */
  readonly ack: bigint | undefined;

  constructor(request: string, ack?: bigint) {
    super(
      "PROTOCOL",
      `Cannot do ${request}: the back-end refused it${
        ack === undefined ? "" : ` (ack ${ack})`
      }`,
    );
    this.request = request;
    this.ack = ack;
  }
}
