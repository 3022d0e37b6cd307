import assert from "node:assert/strict";
import { test } from "../harness.ts";
import {
  type Channel,
  decodeHeader,
  describeMessage,
  HEADER_SIZE,
  type ObservedMessage,
} from "../../protocol/mod.ts";
import { hex } from "./hex.ts";

/** Describes header and payload as they are on the wire. */
function line(
  direction: ObservedMessage["direction"],
  text: string,
  descriptorCount = 0,
  channel: Channel = "frontend",
): string {
  const bytes = hex(text);
  const header = decodeHeader(bytes);
  assert.ok(header);
  const payload = bytes.subarray(HEADER_SIZE);
  return describeMessage({
    direction,
    channel,
    header,
    payload,
    descriptorCount,
  });
}

test("protocol: requests are shown with their fields and flags", () => {
  assert.equal(
    line("received", "08000000 09000000 08000000 00000000 80000000"),
    "<- 8 SET_VRING_NUM index=0 num=128 [need_reply]",
  );
  assert.equal(
    line("received", "0c000000 01000000 08000000 0100000000000000", 1),
    "<- 12 SET_VRING_KICK index=1 fds=1",
  );
  assert.equal(
    line("received", "0d000000 01000000 08000000 0101000000000000"),
    "<- 13 SET_VRING_CALL index=1 nofd",
  );
  assert.equal(
    line("received", "10000000 01000000 08000000 0900010000000000"),
    "<- 16 SET_PROTOCOL_FEATURES 0x10009(MQ|REPLY_ACK|STATUS)",
  );
  assert.equal(
    line(
      "received",
      "25000000 09000000 28000000 0000000000000000 0000000001000000" +
        "0010000000000000 00000000007f0000 0000000000000000",
      1,
    ),
    "<- 37 ADD_MEM_REG guest_address=0x100000000 size=4096 " +
      "user_address=0x7f0000000000 mmap_offset=0 fds=1 [need_reply]",
  );
  assert.equal(
    line("received", "01000000 01000000 00000000"),
    "<- 1 GET_FEATURES",
  );
});

test("protocol: replies and acks are shown as such", () => {
  assert.equal(
    line("sent", "0b000000 05000000 08000000 00000000 07000000"),
    "-> 11 GET_VRING_BASE index=0 num=7",
  );
  assert.equal(
    line("sent", "12000000 05000000 08000000 0000000000000000"),
    "-> 18 SET_VRING_ENABLE ack=0",
  );
  assert.equal(
    line("sent", "05000000 05000000 08000000 0000000000000000"),
    "-> 5 SET_MEM_TABLE u64=0x0",
  );
  assert.equal(
    line("sent", "18000000 05000000 00000000"),
    "-> 24 GET_CONFIG empty",
  );
  assert.equal(
    line("sent", "1c000000 05000000 00000000", 1),
    "-> 28 POSTCOPY_ADVISE fds=1",
  );
});

test("protocol: messages on the back-end's socket have their own table", () => {
  assert.equal(
    line("sent", "02000000 01000000 00000000", 0, "backend"),
    "-> 2 BACKEND_CONFIG_CHANGE_MSG",
  );
});

test("protocol: what is wrong with a message is shown, not thrown", () => {
  assert.equal(
    line("received", "ffffffff 01000000 02000000 0000"),
    "<- 4294967295 unknown 2 bytes",
  );
  assert.equal(
    line("received", "08000000 02000000 04000000 00000000"),
    "<- 8 SET_VRING_NUM vring state payload has 4 bytes, needs 8 [version 2]",
  );
  assert.equal(
    line("received", "01000000 110000f0 00000000"),
    "<- 1 GET_FEATURES [flags 0xf0000010]",
  );
  assert.equal(
    line("received", "08000000 01000000 ffffffff"),
    "<- 8 SET_VRING_NUM size=4294967295",
  );
});

test("protocol: every id, direction and size gives one line", () => {
  for (const channel of ["frontend", "backend"] as const) {
    for (let request = 0; request <= 46; request++) {
      for (const flags of [1, 5, 9]) {
        for (const size of [0, 8, 16, 40, 1072, 4096]) {
          const text = describeMessage({
            direction: "received",
            channel,
            header: { request, flags, size },
            payload: new Uint8Array(size).fill(0xff),
          });
          assert.match(text, /^<- \d+ \w+/);
          assert.doesNotMatch(text, /\n/);
        }
      }
    }
  }
});
