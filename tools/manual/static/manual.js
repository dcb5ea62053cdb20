// SPDX-License-Identifier: Apache-2.0
// A table or formula wider than the page scrolls and says so; the version menu opens another manual.
document.addEventListener("DOMContentLoaded", () => {
  const wide = document.querySelectorAll(".table-wrapper, div.math");
  const mark = () =>
    wide.forEach((box) => {
      const scrolls = box.scrollWidth > box.clientWidth + 1;
      box.classList.toggle("scrolls", scrolls);
      if (scrolls) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    });
  mark();
  window.addEventListener("load", mark);
  window.addEventListener("resize", mark);
  // Formulas get their width when they are typeset.
  if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(mark);

  const menu = document.getElementById("version-menu");
  if (menu) menu.addEventListener("change", () => window.location.assign(menu.value));
});
