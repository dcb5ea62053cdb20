// SPDX-License-Identifier: Apache-2.0
// What is wider than the page scrolls and says so; the version menu opens another manual.
document.addEventListener("DOMContentLoaded", () => {
  // A cell with a long text stays wide where the table scrolls.
  document.querySelectorAll("table.docutils td").forEach((cell) => {
    if (cell.textContent.length > 70) cell.classList.add("long");
  });
  const mark = () => {
    // On a phone an image that is much wider than high scrolls, because its text would be too small.
    document.querySelectorAll("article img").forEach((image) => {
      if (image.naturalWidth > 900 && image.naturalWidth > 2.3 * image.naturalHeight)
        image.parentElement.classList.add("wide-image");
    });
    document.querySelectorAll(".table-wrapper, div.math, .wide-image").forEach((box) => {
      const scrolls = box.scrollWidth > box.clientWidth + 1;
      box.classList.toggle("scrolls", scrolls);
      if (scrolls) box.setAttribute("tabindex", "0");
      else box.removeAttribute("tabindex");
    });
  };
  mark();
  window.addEventListener("load", mark);
  window.addEventListener("resize", mark);
  // Formulas get their width when they are typeset.
  if (window.MathJax && MathJax.startup) MathJax.startup.promise.then(mark);

  // An entry that has moved to another page: the general index knows its address.
  const id = decodeURIComponent(window.location.hash.slice(1));
  if (id && !document.getElementById(id)) {
    const root = new URL(document.documentElement.dataset.content_root || "./", window.location);
    fetch(new URL("genindex.html", root))
      .then((answer) => answer.text())
      .then((text) => {
        const page = new DOMParser().parseFromString(text, "text/html");
        const link = page.querySelector(`a[href$="#${CSS.escape(id)}"]`);
        if (link) window.location.replace(new URL(link.getAttribute("href"), root));
      })
      .catch(() => {}); // pages opened as files may not read each other
  }

  const menu = document.getElementById("version-menu");
  if (menu) menu.addEventListener("change", () => window.location.assign(menu.value));
});
