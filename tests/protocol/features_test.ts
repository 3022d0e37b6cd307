import assert from "node:assert/strict";
import { test } from "../harness.ts";
import {
  describeFeatures,
  describeProtocolFeatures,
  featureMask,
  hasFeature,
  ProtocolFeature,
  VirtioFeature,
} from "../../protocol/mod.ts";

test("protocol: virtio feature bits have the specification's numbers", () => {
  assert.deepEqual(VirtioFeature, {
    NOTIFY_ON_EMPTY: 24,
    LOG_ALL: 26,
    ANY_LAYOUT: 27,
    RING_INDIRECT_DESC: 28,
    RING_EVENT_IDX: 29,
    PROTOCOL_FEATURES: 30,
    VERSION_1: 32,
    ACCESS_PLATFORM: 33,
    RING_PACKED: 34,
    IN_ORDER: 35,
    ORDER_PLATFORM: 36,
    SR_IOV: 37,
    NOTIFICATION_DATA: 38,
    NOTIF_CONFIG_DATA: 39,
    RING_RESET: 40,
  });
});

test("protocol: protocol feature bits are 0..23 in the specification's order", () => {
  assert.deepEqual(
    Object.entries(ProtocolFeature).map(([name, bit]) => `${bit} ${name}`),
    ("MQ LOG_SHMFD RARP REPLY_ACK NET_MTU BACKEND_REQ CROSS_ENDIAN " +
      "CRYPTO_SESSION PAGEFAULT CONFIG BACKEND_SEND_FD HOST_NOTIFIER " +
      "INFLIGHT_SHMFD RESET_DEVICE INBAND_NOTIFICATIONS " +
      "CONFIGURE_MEM_SLOTS STATUS XEN_MMAP SHARED_OBJECT DEVICE_STATE " +
      "GET_VRING_BASE_INFLIGHT GPA_ADDRESSES SHMEM " +
      "GET_VRING_BASE_SKIP_DRAIN").split(" ").map((name, bit) =>
        `${bit} ${name}`
      ),
  );
});

test("protocol: a feature bit is tested as a bit, not as a mask", () => {
  // 30 = 0x1e: bits 1..4 must not pass for bit 30.
  assert.equal(hasFeature(0x1en, VirtioFeature.PROTOCOL_FEATURES), false);
  assert.equal(
    hasFeature(0x4000_0000n, VirtioFeature.PROTOCOL_FEATURES),
    true,
  );
  assert.equal(
    featureMask(VirtioFeature.PROTOCOL_FEATURES, VirtioFeature.VERSION_1),
    0x1_4000_0000n,
  );
  assert.equal(featureMask(), 0n);
  assert.equal(featureMask(63), 1n << 63n);
  assert.equal(hasFeature(1n << 63n, 63), true);
});

test("protocol: masks are described by the names of their bits", () => {
  assert.equal(
    describeFeatures(featureMask(VirtioFeature.VERSION_1, 5)),
    "0x100000020(5|VERSION_1)",
  );
  // The mask that DPDK's virtio-user negotiates.
  assert.equal(
    describeProtocolFeatures(0x10009n),
    "0x10009(MQ|REPLY_ACK|STATUS)",
  );
  assert.equal(describeFeatures(0n), "0x0");
});
