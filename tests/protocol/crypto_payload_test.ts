import assert from "node:assert/strict";
import { test } from "../harness.ts";
import { cryptoSession, plainWire } from "../../protocol/mod.ts";
import { hex, toHex } from "./hex.ts";

/** 1072 zero bytes with some set by hand. */
function session(parts: Record<number, string>): Uint8Array {
  const bytes = new Uint8Array(1072);
  for (const [offset, text] of Object.entries(parts)) {
    bytes.set(hex(text), Number(offset));
  }
  return bytes;
}

test("protocol: symmetric crypto session as QEMU lays it out", () => {
  const bytes = session({
    0: "02000000",
    8: "03000000 10000000 05000000 14000000 02000000 06000000 02 01 03 04",
    56: "00112233445566778899aabbccddeeff",
    120: "abcd",
    1064: "ffffffffffffffff",
  });
  const value = {
    kind: "symmetric" as const,
    opcode: 2,
    sessionId: -1n,
    symmetric: {
      cipherAlgorithm: 3,
      hashAlgorithm: 5,
      digestSize: 20,
      aadSize: 6,
      opType: 2,
      direction: 1,
      hashMode: 3,
      chainOrder: 4,
      cipherKey: hex("00112233445566778899aabbccddeeff"),
      authKey: hex("abcd"),
    },
  };
  assert.deepEqual(cryptoSession.decode(bytes, plainWire), {
    ok: true,
    value,
  });
  assert.equal(toHex(cryptoSession.encode(value, plainWire)), toHex(bytes));
});

test("protocol: asymmetric crypto session as QEMU lays it out", () => {
  const bytes = session({
    0: "04040000",
    8: "01000000 02000000 03000000",
    32: "01000000 07000000",
    40: "aabbcc",
    1064: "2a00000000000000",
  });
  const value = {
    kind: "asymmetric" as const,
    opcode: 0x404,
    sessionId: 42n,
    asymmetric: {
      algorithm: 1,
      keyType: 2,
      paddingAlgorithm: 1,
      hashAlgorithm: 7,
      key: hex("aabbcc"),
    },
  };
  assert.deepEqual(cryptoSession.decode(bytes, plainWire), {
    ok: true,
    value,
  });
  assert.equal(toHex(cryptoSession.encode(value, plainWire)), toHex(bytes));
});

test("protocol: crypto key lengths above the buffers are refused (CVE-2020-10724)", () => {
  const reason = (parts: Record<number, string>) => {
    const decoded = cryptoSession.decode(session(parts), plainWire);
    return decoded.ok ? null : decoded.reason;
  };
  assert.equal(reason({ 12: "40000000", 24: "00020000" }), null);
  assert.match(reason({ 12: "41000000" }) ?? "", /cipher key has 65 bytes/);
  assert.match(reason({ 24: "01020000" }) ?? "", /auth key has 513 bytes/);
  assert.match(reason({ 12: "ffffffff" }) ?? "", /limit is 64/);
  assert.equal(reason({ 0: "04040000", 16: "00040000" }), null);
  assert.match(
    reason({ 0: "04040000", 16: "01040000" }) ?? "",
    /key has 1025 bytes, limit is 1024/,
  );
});

test("protocol: crypto session description shows no key bytes", () => {
  const decoded = cryptoSession.decode(
    session({ 0: "02000000", 12: "04000000", 56: "deadbeef" }),
    plainWire,
  );
  assert.ok(decoded.ok);
  const text = cryptoSession.describe(decoded.value);
  assert.match(text, /key_len=4/);
  assert.doesNotMatch(text, /dead|222/);
});
