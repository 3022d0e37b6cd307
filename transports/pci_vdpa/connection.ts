/**
 * A vhost-user connection whose device is a PCI device: messages, kicks and
 * calls are the socket's, queues and memory the device's.
 *
 * @module
 */

import type { RegionDescription } from "../../ffi/guest_memory.ts";
import { featureMask, VirtioFeature } from "../../protocol/features.ts";
import type {
  BackendChannel,
  Connection,
  DataPath,
  Descriptors,
  KickSource,
  Message,
  NotificationSink,
  OutgoingMessage,
} from "../transport.ts";
import { PciVdpaDataPath } from "./data_path.ts";
import type { VdpaDevice } from "./device.ts";
import { unusableProtocolFeatures } from "./features.ts";

/** Those of vhost-user itself. */
const ownFeatures = featureMask(
  VirtioFeature.PROTOCOL_FEATURES,
  VirtioFeature.LOG_ALL,
);

export class PciVdpaConnection implements Connection {
  readonly name: string;
  readonly protocolFeatures: bigint;
  readonly features: bigint;
  readonly carriesDescriptors = true;
  readonly dataPath: DataPath;
  /** The socket's. */
  readonly inner: Connection;

  constructor(inner: Connection, device: VdpaDevice, name: string) {
    this.inner = inner;
    this.name = name;
    this.features = device.features | ownFeatures;
    this.protocolFeatures = inner.protocolFeatures & ~unusableProtocolFeatures;
    this.dataPath = new PciVdpaDataPath(device);
  }

  get hangupFd(): number | null {
    return this.inner.hangupFd;
  }

  get onHangup(): (() => void) | undefined {
    return this.inner.onHangup;
  }

  set onHangup(handler: (() => void) | undefined) {
    this.inner.onHangup = handler;
  }

  receive(): Promise<Message | null> {
    return this.inner.receive();
  }

  send(message: OutgoingMessage): void {
    this.inner.send(message);
  }

  regionSource(message: Message, index: number): RegionDescription["source"] {
    return this.inner.regionSource(message, index);
  }

  openKick(
    queueIndex: number,
    descriptors: Descriptors,
    onKick: (() => void) | null,
  ): KickSource | null {
    return this.inner.openKick(queueIndex, descriptors, onKick);
  }

  openCall(
    queueIndex: number,
    descriptors: Descriptors,
  ): NotificationSink | null {
    return this.inner.openCall(queueIndex, descriptors);
  }

  openError(
    queueIndex: number,
    descriptors: Descriptors,
  ): NotificationSink | null {
    return this.inner.openError(queueIndex, descriptors);
  }

  openBackendChannel(descriptors: Descriptors): BackendChannel {
    return this.inner.openBackendChannel(descriptors);
  }

  close(): void {
    this.inner.close();
  }
}
