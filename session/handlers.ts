/**
 * The handlers of the front-end's messages, by id. A handler runs when every
 * check of its row has passed; it answers the value of the row's reply, or
 * throws a refusal. What must be stopped first is stopped by the handler; what
 * can start afterwards is started by the session.
 *
 * @module
 */

import { FrontendRequest as Id } from "../protocol/frontend_request.ts";
import type { PayloadOf, ReplyOf } from "../protocol/frontend_request.ts";
import type { FrontendRequestId } from "../protocol/frontend_request.ts";
import type { Message } from "../transports/transport.ts";
import * as config from "./handlers/config.ts";
import * as deviceState from "./handlers/device_state.ts";
import * as dirtyLog from "./handlers/dirty_log.ts";
import * as features from "./handlers/features.ts";
import * as inflight from "./handlers/inflight.ts";
import { iotlb } from "./handlers/iotlb.ts";
import * as lifecycle from "./handlers/lifecycle.ts";
import * as memory from "./handlers/memory.ts";
import * as postcopy from "./handlers/postcopy.ts";
import * as shared from "./handlers/shared.ts";
import * as vring from "./handlers/vring.ts";
import type { ReplyWithDescriptors } from "./reply.ts";
import type { Session } from "./session.ts";

type Handlers = {
  readonly [I in FrontendRequestId]?: (
    session: Session,
    payload: PayloadOf<I>,
    message: Message,
  ) => Result<I> | Promise<Result<I>>;
};
type Result<I extends FrontendRequestId> =
  | (null extends ReplyOf<I> ? void : ReplyOf<I> | void)
  | ReplyWithDescriptors<ReplyOf<I>>;

/** Messages without an entry reach the user's `customMessage`. */
export const handlers: Handlers = {
  [Id.GET_FEATURES]: features.getFeatures,
  [Id.SET_FEATURES]: features.setFeatures,
  [Id.SET_OWNER]: lifecycle.setOwner,
  [Id.RESET_OWNER]: lifecycle.resetOwner,
  [Id.SET_MEM_TABLE]: memory.setMemoryTable,
  [Id.SET_LOG_BASE]: dirtyLog.setLogBase,
  [Id.SET_LOG_FD]: dirtyLog.setLogFd,
  [Id.SET_VRING_NUM]: vring.setNum,
  [Id.SET_VRING_ADDR]: vring.setAddress,
  [Id.SET_VRING_BASE]: vring.setBase,
  [Id.GET_VRING_BASE]: vring.getBase,
  [Id.SET_VRING_KICK]: vring.setKick,
  [Id.SET_VRING_CALL]: vring.setCall,
  [Id.SET_VRING_ERR]: vring.setError,
  [Id.GET_PROTOCOL_FEATURES]: features.getProtocolFeatures,
  [Id.SET_PROTOCOL_FEATURES]: features.setProtocolFeatures,
  [Id.GET_QUEUE_NUM]: features.getQueueNum,
  [Id.SET_VRING_ENABLE]: vring.setEnable,
  [Id.SET_BACKEND_REQ_FD]: lifecycle.setBackendChannel,
  [Id.IOTLB_MSG]: iotlb,
  [Id.GET_CONFIG]: config.getConfig,
  [Id.SET_CONFIG]: config.setConfig,
  [Id.POSTCOPY_ADVISE]: postcopy.advise,
  [Id.POSTCOPY_LISTEN]: postcopy.listen,
  [Id.POSTCOPY_END]: postcopy.end,
  [Id.GET_INFLIGHT_FD]: inflight.getInflightFd,
  [Id.SET_INFLIGHT_FD]: inflight.setInflightFd,
  [Id.RESET_DEVICE]: lifecycle.resetDevice,
  [Id.VRING_KICK]: vring.kick,
  [Id.GET_MAX_MEM_SLOTS]: memory.getMaxMemorySlots,
  [Id.ADD_MEM_REG]: memory.addRegion,
  [Id.REM_MEM_REG]: memory.removeRegion,
  [Id.SET_STATUS]: lifecycle.setStatus,
  [Id.GET_STATUS]: lifecycle.getStatus,
  [Id.GET_SHARED_OBJECT]: shared.getSharedObject,
  [Id.SET_DEVICE_STATE_FD]: deviceState.setDeviceStateFd,
  [Id.CHECK_DEVICE_STATE]: deviceState.checkDeviceState,
  [Id.GET_SHMEM_CONFIG]: shared.getSharedMemoryConfig,
  [Id.GET_VRING_BASE_SKIP_DRAIN]: vring.getBaseSkipDrain,
};
