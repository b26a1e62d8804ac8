// How far text stands out from what is behind it, by WCAG 2: the least of all that says something, as [ratio, where].
(() => {
  const paint = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data];
  };
  const linear = (x) => x <= 0.04045 * 255 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const over = (a, b) => [0, 1, 2].map((i) => (a[i] * a[3] + b[i] * (255 - a[3])) / 255);
  const behind = (node) => over(rgba(getComputedStyle(node).backgroundColor), node.parentElement ? behind(node.parentElement) : [255, 255, 255]);
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!says || ["SCRIPT", "NOSCRIPT", "OPTION"].includes(node.tagName) || !node.getClientRects().length) continue;
    const back = behind(node), ink = over(rgba(getComputedStyle(node).color), back);
    const [low, high] = [light(ink), light(back)].sort((a, b) => a - b);
    found.push([(high + 0.05) / (low + 0.05), `${node.tagName}.${node.className} ${node.textContent.trim().slice(0, 30)}`]);
  }
  return found.sort((a, b) => a[0] - b[0]).slice(0, 3);
})();
