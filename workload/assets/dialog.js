// A question before something is done.

import { h } from "./dom.js";

/**
 * Asks by a modal dialog; resolves to the form's data when it is confirmed, to null when it is
 * not. Escape and Cancel are the same. The focus starts on the dialog itself, so that no key that
 * is still held down confirms anything.
 */
export function confirm({ title, body, action, signal }) {
  return new Promise((resolve) => {
    const titleId = "dialog-title";
    const cancel = h("button", { type: "button", value: "cancel", onclick: () => dialog.close() }, "Cancel");
    const form = h("form", { method: "dialog" },
      h("h2", { id: titleId }, title),
      body,
      h("div.buttons", {}, cancel, h("button.primary", { value: "confirm" }, action)));
    const dialog = h("dialog", {
      autofocus: true, tabindex: "-1",
      "aria-labelledby": titleId,
      // A click beside the dialog is a click on its backdrop.
      onclick: (event) => event.target === dialog && dialog.close(),
      onclose: () => {
        resolve(dialog.returnValue === "confirm" ? new FormData(form) : null);
        dialog.remove();
      },
    }, form);
    signal?.addEventListener("abort", () => dialog.close(), { once: true });
    document.body.append(dialog);
    dialog.showModal();
  });
}
