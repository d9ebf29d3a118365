/* Runs before the page is drawn, so that a chosen theme does not flash. */

(() => {
  let theme = null;
  try {
    theme = localStorage.getItem("lascaux.theme");
  } catch {
    // Storage may be forbidden; the system's theme it is.
  }
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
})();
