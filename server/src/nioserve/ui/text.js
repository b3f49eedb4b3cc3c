// Showing an answer. Only text nodes and elements made here: nothing the model writes is ever read as HTML.

const FENCE = /^```[^\n]*\n([\s\S]*?)(?:\n?^```[ \t]*$|$(?![\s\S]))/gm;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/g;

function element(name, text) {
  const node = document.createElement(name);
  node.textContent = text;
  return node;
}

function inline(text) {
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    nodes.push(document.createTextNode(text.slice(last, match.index)));
    nodes.push(match[1] !== undefined ? element("code", match[1]) : element("strong", match[2]));
    last = match.index + match[0].length;
  }
  nodes.push(document.createTextNode(text.slice(last)));
  return nodes;
}

/** Replace the content of `target` with the text, its fenced code as blocks, `code` and **strong** marked. */
export function render(target, text) {
  const nodes = [];
  let last = 0;
  // A block has margins of its own: the empty lines around it are not shown as well.
  for (const match of text.matchAll(FENCE)) {
    nodes.push(...inline(text.slice(last, match.index).replace(last ? /^\n+|\n+$/g : /\n+$/, "")));
    const block = document.createElement("pre");
    block.append(element("code", match[1]));
    nodes.push(block);
    last = match.index + match[0].length;
  }
  nodes.push(...inline(last ? text.slice(last).replace(/^\n+/, "") : text));
  target.replaceChildren(...nodes);
}
