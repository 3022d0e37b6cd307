/**
 * A null disk of the kernel's own driver beside one on a Unix socket: the part
 * that is ours. The kernel is a model (its interrupt is a signal of an eventfd,
 * as a call is); the driver is a thread of this process in both cases.
 *
 *   deno run -A bench/vduse.ts
 *
 * @module
 */

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { Worker } from "node:worker_threads";
import { core } from "../ffi/core.ts";
import { check } from "../ffi/errors.ts";
import { GuestRam } from "../driver/guest_ram.ts";
import { SplitDriver } from "../driver/split_driver.ts";
import { VhostUserDevice } from "../frontend/mod.ts";
import { blkDevice, nullBacking, registerTarget } from "../mod.ts";
import { featureMask, VirtioFeature } from "../protocol/features.ts";
import { VduseModel } from "../tests/support/vduse_model.ts";
import {
  dataBytes,
  type Load,
  loadConfig,
  loadFigures,
  type LoadPlace,
} from "./load.ts";
import { median } from "./measure.ts";

const size = 2 ** 30;
const rounds = 7;
const features = featureMask(
  VirtioFeature.VERSION_1,
  VirtioFeature.RING_EVENT_IDX,
  VirtioFeature.RING_INDIRECT_DESC,
  // FLUSH
  9,
);
const position = 0x8000;
const sectors = BigInt(size / 512);

const worker = new Worker(new URL("./load_worker.ts", import.meta.url));

async function rate(load: Load, place: LoadPlace): Promise<number> {
  const config = new Uint8Array(loadConfig(load, place).buffer);
  const answer = new Promise<{ code: number; out: BigUint64Array }>(
    (resolve) => worker.once("message", resolve),
  );
  worker.postMessage(config);
  const { code, out } = await answer;
  check(code, "Cannot run a load");
  const { errors, perSecond } = loadFigures(out);
  if (errors > 0) throw new Error(`${errors} I/O errors`);
  return perSecond;
}

/** A disk on a socket, and its front-end here. */
async function onSocket(path: string): Promise<LoadPlace> {
  const disk = blkDevice({ backing: nullBacking(size) });
  await registerTarget({ transport: "vhost-user", address: path, ...disk });
  const device = await VhostUserDevice.open({
    path,
    features: features | featureMask(VirtioFeature.PROTOCOL_FEATURES),
    queueSize: 256,
    ramSize: 64 << 20,
    usesCalls: false,
    packed: false,
    // The kernel's requests are tracked too.
    recovers: true,
  });
  const [queue] = device.queues;
  const data = device.ram.allocate(dataBytes, 4096);
  return { queue, data, sectors, kickFd: queue.kickFd, position };
}

/** The same disk of the model's driver. */
async function onKernel(runtimeFolder: string): Promise<LoadPlace> {
  const kernel = new VduseModel();
  const disk = blkDevice({ backing: nullBacking(size) });
  await registerTarget({
    ...disk,
    transport: "VDUSE",
    address: "bench",
    kernel,
    runtimeFolder,
  });
  const device = kernel.devices.get("bench")!;
  const start = 1 << 20;
  const ram = new GuestRam([
    { gpa: BigInt(start), size: 64 << 20, mmapOffset: start },
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
    queueSize: 256,
    features,
    usesCalls: false,
    notify: () => device.kick(0),
  });
  const { descriptor, available, used } = queue.deviceAddresses;
  device.queues[0].called = () => core.eventfdSignal(queue.callFd);
  device.queues[0].info = {
    descriptor,
    driver: available,
    device: used,
    size: 256,
    base: 0,
    isReady: true,
  };
  await device.setStatus(15);
  while (device.queues[0].kick < 0) {
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
  const data = ram.allocate(dataBytes, 4096);
  const kickFd = device.queues[0].kick;
  return { queue, data, sectors, kickFd, position };
}

const folder = mkdtempSync(join(tmpdir(), "vhost2-bench-"));
try {
  const socket = await onSocket(join(folder, "socket"));
  const kernel = await onKernel(folder);
  for (const spins of [true, false]) {
    for (const depth of [1, 32, 128]) {
      const load: Load = {
        operation: "read",
        requestBytes: 4096,
        isRandom: true,
        durationMs: 400,
        depth,
        spins,
      };
      await rate(load, socket);
      await rate(load, kernel);
      const pairs: [number, number][] = [];
      for (let round = 0; round < rounds; round++) {
        // In turns: A B, B A.
        if (round % 2 === 0) {
          const a = await rate(load, kernel);
          pairs.push([a, await rate(load, socket)]);
        } else {
          const b = await rate(load, socket);
          pairs.push([await rate(load, kernel), b]);
        }
      }
      const show = (values: number[]) =>
        `${Math.round(median(values) / 1000)} k/s`;
      console.log(
        `null disk, 4 KiB reads, depth ${depth}, ${
          spins ? "driver spins" : "driver sleeps"
        }: VDUSE ${show(pairs.map(([a]) => a))}, socket ${
          show(pairs.map(([, b]) => b))
        }, ratio ${median(pairs.map(([a, b]) => a / b)).toFixed(2)}`,
      );
    }
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
process.exit();
