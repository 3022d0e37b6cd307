import assert from "node:assert/strict";
import { test } from "../harness.ts";
import {
  classifyReplyHeader,
  classifyRequestHeader,
  decodeHeader,
  encodeHeader,
  encodeReply,
  encodeRequest,
  HEADER_SIZE,
  MAX_PAYLOAD_SIZE,
  needsReply,
} from "../../protocol/mod.ts";
import { hex, toHex } from "./hex.ts";

test("protocol: header is request, flags, size in 12 bytes", () => {
  const bytes = hex("08000000 09000000 08000000");
  const header = { request: 8, flags: 9, size: 8 };
  assert.equal(HEADER_SIZE, 12);
  assert.deepEqual(decodeHeader(bytes), header);
  assert.equal(toHex(encodeHeader(header)), toHex(bytes));
  assert.ok(needsReply(header));
});

test("protocol: fewer than 12 bytes are no header", () => {
  for (let size = 0; size < 12; size++) {
    assert.equal(decodeHeader(new Uint8Array(size)), null);
  }
});

test("protocol: request header fields keep all 32 bits", () => {
  assert.deepEqual(decodeHeader(new Uint8Array(12).fill(0xff)), {
    request: 0xffff_ffff,
    flags: 0xffff_ffff,
    size: 0xffff_ffff,
  });
});

test("protocol: versions other than 1 are refused", () => {
  for (const version of [0, 2, 3]) {
    const header = { request: 1, flags: version, size: 0 };
    const error = classifyRequestHeader(header);
    assert.equal(error?.code, "version");
    assert.equal(error?.reason, `message version is ${version}, not 1`);
  }
  assert.equal(
    classifyRequestHeader({ request: 1, flags: 1, size: 0 }),
    null,
  );
});

test("protocol: a request with the REPLY bit is refused", () => {
  const error = classifyRequestHeader({ request: 1, flags: 5, size: 0 });
  assert.equal(error?.code, "reply");
});

test("protocol: payload size has a limit", () => {
  const size = MAX_PAYLOAD_SIZE;
  assert.equal(classifyRequestHeader({ request: 1, flags: 1, size }), null);
  for (const tooLarge of [size + 1, 0xffff_ffff]) {
    const error = classifyRequestHeader({
      request: 1,
      flags: 1,
      size: tooLarge,
    });
    assert.equal(error?.code, "size");
    assert.match(error?.reason ?? "", new RegExp(`${tooLarge} bytes`));
  }
});

test("protocol: a reply must name its request and have the REPLY bit", () => {
  const good = { request: 2, flags: 5, size: 8 };
  assert.equal(classifyReplyHeader(good, 2), null);
  assert.equal(classifyReplyHeader(good, 3)?.code, "request");
  assert.equal(classifyReplyHeader({ ...good, flags: 1 }, 2)?.code, "reply");
  assert.equal(classifyReplyHeader({ ...good, flags: 4 }, 2)?.code, "version");
  assert.equal(classifyReplyHeader({ ...good, size: 5000 }, 2)?.code, "size");
});

test("protocol: a reply's flags are exactly 5, NEED_REPLY never echoed", () => {
  assert.equal(
    toHex(encodeReply(11, hex("00000000 07000000"))),
    toHex(hex("0b000000 05000000 08000000 00000000 07000000")),
  );
  assert.equal(
    toHex(encodeReply(24, null)),
    toHex(hex("18000000 05000000 00000000")),
  );
});

test("protocol: a request's flags are version and NEED_REPLY", () => {
  assert.equal(
    toHex(encodeRequest(2, null)),
    toHex(hex("02000000 01000000 00000000")),
  );
  assert.equal(
    toHex(encodeRequest(8, hex("00000000 80000000"), true)),
    toHex(hex("08000000 09000000 08000000 00000000 80000000")),
  );
  assert.throws(
    () => encodeRequest(2, new Uint8Array(MAX_PAYLOAD_SIZE + 1)),
    RangeError,
  );
});
