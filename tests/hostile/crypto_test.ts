// Row 3 of the catalogue of hostile inputs: key lengths of a crypto session.
import assert from "node:assert/strict";
import {
  FrontendConnection,
  FrontendRequest as Request,
} from "../../frontend/mod.ts";
import { type DeviceOptions, featureMask, ProtocolFeature } from "../../mod.ts";
import { test } from "../harness.ts";
import { withBystander } from "./world.ts";

const rounds = 20;
const crypto = featureMask(
  ProtocolFeature.REPLY_ACK,
  ProtocolFeature.CRYPTO_SESSION,
);

/** struct vhost_user_crypto_session: its size and the fields attacked. */
const size = 1072;
const opcode = 0;
const cipherKeyLength = 12;
const authKeyLength = 24;
const asymmetricKeyLength = 16;
const symmetric = 2;
const asymmetric = 0x404;

const attacks = [
  ["a cipher key of 65 bytes", symmetric, cipherKeyLength, 65],
  ["a cipher key of 4 GiB", symmetric, cipherKeyLength, 0xffffffff],
  ["an auth key of 513 bytes", symmetric, authKeyLength, 513],
  ["an auth key of 2 GiB", symmetric, authKeyLength, 0x80000000],
  ["an asymmetric key of 1025 bytes", asymmetric, asymmetricKeyLength, 1025],
] as const;

for (const [name, operation, field, length] of attacks) {
  test(`row 3: CREATE_CRYPTO_SESSION with ${name} ends the connection and never reaches the device`, async () => {
    const device: DeviceOptions = {
      protocolFeatures: crypto & ~featureMask(ProtocolFeature.REPLY_ACK),
      device: () => ({
        customMessage: () => assert.fail("the device was asked"),
      }),
    };
    await withBystander(async (world) => {
      await world.repeat(rounds, async () => {
        const connection = await FrontendConnection.connect(world.path);
        await connection.setFeatures(await connection.getFeatures());
        await connection.setProtocolFeatures(crypto, { ack: true });
        const payload = new Uint8Array(size).fill(0xaa, 56, 1064);
        const view = new DataView(payload.buffer);
        view.setUint32(opcode, operation, true);
        view.setUint32(field, length, true);
        await assert.rejects(
          connection.request(Request.CREATE_CRYPTO_SESSION, payload),
          { code: "CLOSED" },
        );
        await world.reported(/key has \d+ bytes, limit is \d+/);
        await world.ended(connection);
      });
    }, device);
  });
}
