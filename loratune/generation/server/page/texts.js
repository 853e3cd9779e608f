/** All texts of the page in English and Chinese, and the current language. */

import { preference, setPreference } from "./storage.js";

export const TEXTS = {
  en: {
    title: "loratune chat",
    skip: "Skip to the message field",
    model: "Model",
    secondModel: "Second model",
    base: "base",
    newChat: "New chat",
    compare: "Compare two models",
    compareNeeds: "A comparison needs a second model: start the server with another adapter",
    settings: "Settings",
    settingsChanged: "Settings (changed)",
    menu: "More",
    close: "Close",
    conversation: "Conversation",
    emptyTitle: "Ask your model something",
    emptyText: "Answers come from your own server and stay in this tab.",
    try1: "Who are you?",
    try2: "Explain in three sentences what fine-tuning changes in a model.",
    try3: "Compare rice and wheat in a small table.",
    message: "Message",
    messageHint: "Write a message",
    send: "Send",
    stop: "Stop",
    keysHint: "Enter: send · Shift + Enter: new line · Esc: stop",
    toLatest: "Jump to the latest",
    you: "You",
    answerOf: "Answer of {model}",
    thinking: "Thinking",
    thought: "Thought",
    waiting: "Waiting for the first token",
    copy: "Copy",
    copied: "Copied",
    copyFailed: "The browser did not allow copying",
    copyAnswer: "Copy the answer",
    copyQuestion: "Copy the question",
    copyCode: "Copy the code",
    code: "Code",
    table: "Table",
    source: "Show as plain text",
    regenerate: "Regenerate",
    edit: "Edit the question",
    editing: "Editing the last question",
    cancel: "Cancel",
    rate: "{rate} tokens/s",
    firstToken: "first token after {seconds} s",
    tokenCount: "{count} tokens",
    finishLength: "truncated at the maximum length",
    finishCancelled: "stopped",
    statusWriting: "The answer is being written",
    statusDone: "Answer of {model}: {text}",
    system: "System prompt",
    systemHint: "Leave empty to use the training's system prompt",
    temperature: "Temperature",
    temperatureHint: "0 always picks the most likely token.",
    maxTokens: "Maximum tokens",
    topP: "Top p",
    topK: "Top k",
    minP: "Min p",
    repetitionPenalty: "Repetition penalty",
    seed: "Seed",
    stopTexts: "Stop strings",
    stopHint: "One per line",
    ownValue: "default",
    randomValue: "random",
    reset: "Reset to defaults",
    appearance: "Appearance",
    themeAuto: "Auto",
    themeLight: "Light",
    themeDark: "Dark",
    language: "Language",
    exportMarkdown: "Export as Markdown",
    exportJson: "Export as JSON",
    help: "Keys and help",
    helpSend: "Send the message",
    helpLine: "New line",
    helpStop: "Stop the answer; close a panel",
    helpEdit: "In an empty field: edit the last question",
    helpNew: "New chat",
    helpCompare: "Compare two models",
    helpSettings: "Settings",
    helpAgain: "Regenerate the answer",
    helpHelp: "This help",
    helpStorage: "The conversation is kept in this tab only and is gone when you close it. "
      + "An exported JSON file can be used as training rows.",
    keyTitle: "This server asks for an API key",
    keyText: "It is in the address that the server printed at startup.",
    apiKey: "API key",
    keyWrong: "The server did not accept this API key.",
    keySend: "Continue",
    retry: "Try again",
    errorOffline: "The server cannot be reached. Is it still running?",
    errorKey: "The server needs its API key.",
    errorBusy: "The server's queue is full. Try again in {seconds} s.",
    errorCut: "The connection ended before the answer was complete.",
    errorServer: "The server answered with status {status}.",
    errorModels: "The server offers no model.",
    exportQuestion: "Question",
    exportThinking: "Thinking",
  },
  zh: {
    title: "loratune 对话",
    skip: "跳到输入框",
    model: "模型",
    secondModel: "第二个模型",
    base: "基座",
    newChat: "新对话",
    compare: "对比两个模型",
    compareNeeds: "对比需要第二个模型：启动服务时再加一个适配器",
    settings: "设置",
    settingsChanged: "设置（已更改）",
    menu: "更多",
    close: "关闭",
    conversation: "对话",
    emptyTitle: "向你的模型提问",
    emptyText: "回答来自你自己的服务，对话只保存在此标签页中。",
    try1: "你是谁？",
    try2: "用三句话说明微调改变了模型的什么。",
    try3: "用一个小表格比较水稻和小麦。",
    message: "消息",
    messageHint: "输入消息",
    send: "发送",
    stop: "停止",
    keysHint: "回车发送 · Shift + 回车换行 · Esc 停止",
    toLatest: "回到最新",
    you: "你",
    answerOf: "{model} 的回答",
    thinking: "思考中",
    thought: "思考过程",
    waiting: "等待第一个词元",
    copy: "复制",
    copied: "已复制",
    copyFailed: "浏览器不允许复制",
    copyAnswer: "复制回答",
    copyQuestion: "复制问题",
    copyCode: "复制代码",
    code: "代码",
    table: "表格",
    source: "显示为纯文本",
    regenerate: "重新回答",
    edit: "编辑问题",
    editing: "正在编辑上一个问题",
    cancel: "取消",
    rate: "{rate} 词元/秒",
    firstToken: "首词元 {seconds} 秒",
    tokenCount: "{count} 词元",
    finishLength: "达到最大长度，已截断",
    finishCancelled: "已停止",
    statusWriting: "正在回答",
    statusDone: "{model} 的回答：{text}",
    system: "系统提示词",
    systemHint: "留空则使用训练时的提示词",
    temperature: "温度",
    temperatureHint: "为 0 时总是选择最可能的词元。",
    maxTokens: "最长回答",
    topP: "核采样 (top p)",
    topK: "候选数 (top k)",
    minP: "最小概率 (min p)",
    repetitionPenalty: "重复惩罚",
    seed: "随机种子",
    stopTexts: "停止文本",
    stopHint: "每行一个",
    ownValue: "默认",
    randomValue: "随机",
    reset: "恢复默认",
    appearance: "外观",
    themeAuto: "自动",
    themeLight: "浅色",
    themeDark: "深色",
    language: "语言",
    exportMarkdown: "导出为 Markdown",
    exportJson: "导出为 JSON",
    help: "按键与帮助",
    helpSend: "发送消息",
    helpLine: "换行",
    helpStop: "停止回答；关闭面板",
    helpEdit: "输入框为空时：编辑上一个问题",
    helpNew: "新对话",
    helpCompare: "对比两个模型",
    helpSettings: "设置",
    helpAgain: "重新回答",
    helpHelp: "本帮助",
    helpStorage: "对话只保存在此标签页中，关闭后即消失。导出的 JSON 文件可以用作训练数据。",
    keyTitle: "此服务需要 API 密钥",
    keyText: "API 密钥在服务启动时打印的地址中。",
    apiKey: "API 密钥",
    keyWrong: "服务没有接受这个 API 密钥。",
    keySend: "继续",
    retry: "重试",
    errorOffline: "无法连接服务。它还在运行吗？",
    errorKey: "服务需要 API 密钥。",
    errorBusy: "服务中排队的问题太多，请在 {seconds} 秒后重试。",
    errorCut: "连接在回答完成之前中断了。",
    errorServer: "服务返回状态 {status}。",
    errorModels: "服务没有提供模型。",
    exportQuestion: "问题",
    exportThinking: "思考过程",
  },
};

let language = preference("language", "");
if (!Object.hasOwn(TEXTS, language)) language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";

/** "en" or "zh". */
export function currentLanguage() {
  return language;
}

/** A text in the page's language, with {name} filled from `values`. */
export function t(key, values = {}) {
  const text = TEXTS[language][key];
  if (text === undefined) throw new Error(`no text ${key}`);
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** Set the page's language; the caller updates texts that it has filled in itself. */
export function setLanguage(chosen) {
  language = chosen;
  setPreference("language", chosen);
  applyTexts(document);
}

/** Fill elements with data-text (content), data-label (label and tooltip) or data-hint (placeholder). */
export function applyTexts(root) {
  for (const each of root.querySelectorAll("[data-text]")) each.textContent = t(each.dataset.text);
  for (const each of root.querySelectorAll("[data-label]")) label(each, each.dataset.label);
  for (const each of root.querySelectorAll("[data-hint]")) each.placeholder = t(each.dataset.hint);
  if (root !== document) return;
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = t("title");
}

/** Set the text `key` as an element's label and tooltip, also after the language changes. */
export function label(element, key) {
  element.dataset.label = key;
  element.setAttribute("aria-label", t(key));
  if (element.tagName === "BUTTON") element.title = t(key);
}
