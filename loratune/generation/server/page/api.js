/** The API client: lists the models and streams answers. */

import { recall, remember } from "./storage.js";

/** A failed request. `key` names the page's text for it; without one, the server's message is shown. */
export class RequestError extends Error {
  constructor(message, key = null, values = {}) {
    super(message);
    this.key = key;
    this.values = values;
  }
}

let askForKey = async () => null;
let asking = null; // the open prompt for an API key, shared by concurrent requests

/** @param {(wasWrong: boolean) => Promise<string | null>} ask shows a form for the API key; null if it was closed. */
export function onMissingKey(ask) {
  askForKey = ask;
}

/** Whether a text can be sent as an API key. */
export function isKey(text) {
  return /^[!-~]+$/.test(text);
}

/** Remove the API key from the address (#api_key=…), so that it is not copied or bookmarked. */
export function takeKey() {
  const given = new URLSearchParams(window.location.hash.slice(1));
  const key = given.get("api_key");
  if (!key || !isKey(key)) return false;
  remember("key", key);
  window.history.replaceState(null, "", window.location.pathname + window.location.search);
  return true;
}

/** The models in the server's order: {id, isBase}. */
export async function listModels() {
  const response = await request("v1/models");
  const { data } = await response.json();
  if (!Array.isArray(data) || !data.length) throw new RequestError("no model", "errorModels");
  return data.map(({ id, parent }) => ({ id, isBase: data.length > 1 && !parent }));
}

/**
 * Stream an answer.
 *
 * @param {object} body the chat completion request.
 * @param {AbortSignal} signal cancels it; the server then stops generating.
 * @yields {{text: string, reasoning: string, finish: string | null, tokens: number | null}}
 */
export async function* streamAnswer(body, signal) {
  const options = { stream: true, stream_options: { include_usage: true } };
  const response = await request("v1/chat/completions", { ...body, ...options }, signal);
  let isFinished = false;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const value = JSON.parse(data);
    if (value.error) throw new RequestError(value.error.message);
    const choice = value.choices?.[0];
    const finish = choice?.finish_reason ?? null;
    isFinished ||= finish !== null;
    yield {
      text: choice?.delta?.content ?? "",
      reasoning: choice?.delta?.reasoning_content ?? "",
      finish,
      tokens: value.usage?.completion_tokens ?? null,
    };
  }
  if (!isFinished) throw new RequestError("cut", "errorCut");
}

/** The data of server-sent events, one text per event. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(error.message, "errorCut");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** A value that may change: {tag, value}, or null if it is still the one of a tag. */
export async function readJson(path, tag, signal) {
  const response = await request(path, null, signal, tag ? { "If-None-Match": tag } : {});
  if (response.status === 304) return null;
  return { tag: response.headers.get("ETag"), value: await response.json() };
}

async function request(path, body = null, signal = undefined, headers = {}) {
  for (let wasWrong = false; ; wasWrong = true) {
    const used = recall("key");
    const response = await send(path, body, signal, used, headers);
    if (response.ok || response.status === 304) return response;
    if (response.status !== 401) throw await failure(response);
    if (recall("key") !== used) continue; // another request has obtained a key meanwhile
    asking ??= askForKey(wasWrong || used !== null).finally(() => (asking = null));
    const key = await asking;
    signal?.throwIfAborted();
    if (!key) throw new RequestError("no API key", "errorKey");
    remember("key", key);
  }
}

async function send(path, body, signal, key, others) {
  const headers = key ? { ...others, Authorization: `Bearer ${key}` } : { ...others };
  const options = { headers, signal, cache: "no-store" };
  if (body) {
    headers["Content-Type"] = "application/json";
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
  }
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError(error.message, "errorOffline");
  }
}

async function failure(response) {
  const { status } = response;
  if (status === 429) {
    return new RequestError("busy", "errorBusy", { seconds: response.headers.get("Retry-After") ?? "1" });
  }
  try {
    return new RequestError((await response.json()).error.message);
  } catch {
    return new RequestError(`status ${status}`, "errorServer", { status });
  }
}
