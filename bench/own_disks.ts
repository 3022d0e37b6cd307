/**
 * Null disks of this process, each on another transport. The kernel of VDUSE
 * and the device of PCI-vhost-user are the tests' models: what is measured is
 * the part that is ours.
 *
 * @module
 */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { core } from "../ffi/core.ts";
import { check } from "../ffi/errors.ts";
import { GuestRam } from "../driver/guest_ram.ts";
import { SplitDriver } from "../driver/split_driver.ts";
import { type QueueDriver, VhostUserDevice } from "../frontend/mod.ts";
import {
  blkDevice,
  nullBacking,
  registerTarget,
  type TransportOptions,
} from "../mod.ts";
import { featureMask, VirtioFeature } from "../protocol/features.ts";
import { VduseModel } from "../tests/support/vduse_model.ts";
import { VhostUserPciModel } from "../tests/support/vhost_user_pci_model.ts";
import { dataBytes, type LoadPlace } from "./load.ts";

const size = 2 ** 30;
const queueSize = 256;
const ramSize = 64 << 20;
const flush = 9;
const features = featureMask(
  VirtioFeature.VERSION_1,
  VirtioFeature.RING_EVENT_IDX,
  VirtioFeature.RING_INDIRECT_DESC,
  flush,
);

/** A disk, and its driver's ring. */
export interface OwnDisk {
  readonly place: LoadPlace;
  close(): Promise<void>;
}

function placeOf(queue: QueueDriver, kickFd: number): LoadPlace {
  return {
    queue,
    kickFd,
    data: queue.ram.allocate(dataBytes, 4096),
    sectors: BigInt(size / 512),
    position: 0x8000,
  };
}

function serve(transport: TransportOptions & { transport: Software }) {
  const disk = blkDevice({ backing: nullBacking(size) });
  return registerTarget({ ...disk, ...transport });
}
type Software = "vhost-user" | "VDUSE" | "PCI-vhost-user";

/** By a front-end on a socket. */
async function openFrontend(
  where: { path: string } | { fd: number },
  recovers: boolean,
): Promise<VhostUserDevice> {
  return await VhostUserDevice.open({
    ...where,
    features: features | featureMask(VirtioFeature.PROTOCOL_FEATURES),
    queueSize,
    ramSize,
    usesCalls: false,
    recovers,
  });
}

/** `recovers`: requests are tracked, as they are for the kernel. */
export async function onSocket(recovers: boolean): Promise<OwnDisk> {
  const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  const path = join(folder, "socket");
  const target = await serve({ transport: "vhost-user", address: path });
  const device = await openFrontend({ path }, recovers);
  const [queue] = device.queues;
  return {
    place: placeOf(queue, queue.kickFd),
    async close() {
      await device.close();
      await target.unregister();
      rmSync(folder, { recursive: true, force: true });
    },
  };
}

/** Behind a model of a virtio-vhost-user device. */
export async function onPci(): Promise<OwnDisk> {
  const model = new VhostUserPciModel({
    device: "crosvm",
    memorySize: ramSize,
  });
  const target = await serve({
    transport: "PCI-vhost-user",
    address: "0000:00:05.0",
    openDevice: () => model,
  });
  const ends = new Int32Array(2);
  check(core.socketPair(ends), "Cannot make a pair of sockets");
  model.attach(ends[1]);
  const device = await openFrontend({ fd: ends[0] }, false);
  const [queue] = device.queues;
  return {
    place: placeOf(queue, queue.kickFd),
    async close() {
      await device.close();
      await target.unregister();
      await model.settled();
    },
  };
}

/** The kernel's own, of a model of it. */
export async function onKernel(): Promise<OwnDisk> {
  const runtimeFolder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
  const kernel = new VduseModel();
  const target = await serve({
    transport: "VDUSE",
    address: "bench",
    kernel,
    runtimeFolder,
  });
  const device = kernel.devices.get("bench")!;
  const start = 1 << 20;
  const ram = new GuestRam([
    { gpa: BigInt(start), size: ramSize, mmapOffset: start },
  ]);
  const [region] = ram.regions;
  region.resizeFile(0x4800_0000 - start);
  device.entries = [{
    start: BigInt(start),
    last: BigInt(start + region.size) - 1n,
    offset: BigInt(start),
    access: 3,
    isDomain: true,
    file: region.fd,
  }];
  await device.setStatus(0);
  device.driverFeatures = features |
    featureMask(VirtioFeature.ACCESS_PLATFORM);
  const queue = new SplitDriver(ram, {
    queueSize,
    features,
    usesCalls: false,
    notify: () => device.kick(0),
  });
  const { descriptor, available, used } = queue.deviceAddresses;
  const [ring] = device.queues;
  ring.called = () => core.eventfdSignal(queue.callFd);
  ring.info = {
    descriptor,
    driver: available,
    device: used,
    size: queueSize,
    base: 0,
    isReady: true,
  };
  await device.setStatus(15);
  while (ring.kick < 0) await new Promise((resolve) => setTimeout(resolve, 1));
  return {
    place: placeOf(queue, ring.kick),
    async close() {
      await target.unregister();
      queue.close();
      ram.close();
      rmSync(runtimeFolder, { recursive: true, force: true });
    },
  };
}
