// Sends frames back and looks at each on its way, in Workers too.
import {
  echoEnd,
  endFactory,
  type EndModule,
  type Frames,
  type NetEnd,
} from "../../mod.ts";

/** Bytes of the frames that DPDK's testpmd is told to send. */
export const frameBytes = 100;

/** IPv4 whose header's checksum is right. */
function isRight(frames: Frames, i: number): boolean {
  const { buffer, byteOffset, length } = frames.at(i);
  if (length !== frameBytes) return false;
  const view = new DataView(buffer, byteOffset, length);
  let sum = 0;
  for (let at = 14; at < 34; at += 2) sum += view.getUint16(at);
  sum = (sum & 0xffff) + (sum >> 16);
  return view.getUint16(12) === 0x0800 && sum === 0xffff;
}

/** What makes it in each isolate. */
export const checkedEcho = endFactory((shared: SharedArrayBuffer): NetEnd => {
  const wrong = new Int32Array(shared);
  const echo = echoEnd();
  return {
    ...echo,
    open(link) {
      const port = echo.open(link);
      return {
        ...port,
        receive(frames, pair) {
          for (let i = 0; i < frames.count; i++) {
            if (!isRight(frames, i)) Atomics.add(wrong, 0, 1);
          }
          port.receive!(frames, pair);
        },
      };
    },
  };
});

/** An end for `netDevice`; the first word counts the frames that were wrong. */
export function checkedEchoEnd(): { end: EndModule; wrong: Int32Array } {
  const options = new SharedArrayBuffer(4);
  return {
    end: { module: import.meta.url, name: "checkedEcho", options },
    wrong: new Int32Array(options),
  };
}
