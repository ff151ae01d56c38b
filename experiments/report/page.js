'use strict';
// Draws every figure of the page, in the colors of the reader's theme; in print in the light ones.
const palettes = JSON.parse(document.getElementById('palettes').textContent);
const dark = matchMedia('(prefers-color-scheme: dark)');
const narrow = matchMedia('(max-width: 40rem)');
const config = {responsive: true, displaylogo: false, displayModeBar: false};
const PRINT_WIDTH = 660; // pixels; an A4 page between its margins

function draw(figure, theme, width) {
  const colors = palettes[theme];
  const {data, layout} = JSON.parse(
    figure.querySelector('script').textContent,
    (key, value) => /color$/.test(key) && colors[String(value).slice(1)] || value,
  );
  const hidden = new Set(
    [...figure.querySelectorAll('button[aria-pressed="false"]')].map(b => b.dataset.series));
  for (const trace of data) trace.visible = !hidden.has(trace.legendgroup);
  if (width) Object.assign(layout, {width, autosize: false});
  else if (narrow.matches) layout.height = Math.min(layout.height, 320);
  Plotly.react(figure.querySelector('.plot'), data, layout, config);
}

const figures = [...document.querySelectorAll('figure')];
const drawAll = (theme = dark.matches ? 'dark' : 'light', width = 0) =>
  figures.forEach(figure => draw(figure, theme, width));

for (const figure of figures) {
  const buttons = [...figure.querySelectorAll('button[data-series]')];
  const press = (button, on) => button.setAttribute('aria-pressed', on);
  for (const button of buttons) {
    button.addEventListener('click', () => {
      press(button, button.getAttribute('aria-pressed') !== 'true');
      draw(figure, dark.matches ? 'dark' : 'light');
    });
    // The first two clicks have cancelled each other out by then.
    button.addEventListener('dblclick', () => {
      const alone = buttons.every(b => b === button || b.getAttribute('aria-pressed') === 'false');
      for (const other of buttons) press(other, alone || other === button);
      draw(figure, dark.matches ? 'dark' : 'light');
    });
  }
}
dark.addEventListener('change', () => drawAll());
addEventListener('beforeprint', () => drawAll('light', PRINT_WIDTH));
addEventListener('afterprint', () => drawAll());
drawAll();
